"""sdjax: language models that invent algorithms to improve language models."""

__version__ = "0.1.0"
