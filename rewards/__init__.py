"""Reward protocol, reward workers and the built-in rewards."""
