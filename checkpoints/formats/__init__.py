"""What checkpoints are stored in: safetensors, Hugging Face folders, GGUF."""
