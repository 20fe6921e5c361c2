"""Tokenizers that other formats describe, in the one form every Hugging Face library reads: tokenizer.json."""
