"""Generators of programs: local models, OpenAI-compatible endpoints and folders of programs."""
