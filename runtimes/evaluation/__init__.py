"""What a model is worth: perplexity of texts and log-likelihood tasks, on any runner."""
