"""Training data at scale: sources, buckets, order, cache; see README.md."""
