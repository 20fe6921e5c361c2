"""Runners on PyTorch: the reference of every comparison."""
