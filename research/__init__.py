"""Beside the package: training of the pocket model, comparison of methods, benchmarks."""
