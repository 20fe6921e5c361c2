"""Measurements behind docs/results.md. Run from the repository: ``python -m benchmarks.<name>``."""
