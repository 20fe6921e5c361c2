"""Checkpoints in NumPy alone: formats, lazy tensors, what a Llama layer consists of, adapters, depth scaling."""
