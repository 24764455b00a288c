"""Benchmarks of the parts that cost time. Not part of the distribution; see bench/README.md."""
