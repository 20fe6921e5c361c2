"""A routed Llama at fixed shapes in PyTorch: a static cache, and decode steps that a CUDA graph replays."""
