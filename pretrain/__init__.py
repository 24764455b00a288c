"""Supervised training of the models that reinforcement learning starts from."""
