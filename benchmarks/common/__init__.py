"""What benchmarks share: measuring, subjects, processes."""
