"""Research beside the package: the pocket model's training, the comparison of methods, benchmarks."""
