"""Rewards behind HTTP: the service that scores in an interpreter of its own, and the client that workers call."""
