"""Text from any runner: tokens in, sampling, tokens out."""
