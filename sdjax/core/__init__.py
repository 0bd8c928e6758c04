"""Errors, configuration and progress: what every other package may import."""
