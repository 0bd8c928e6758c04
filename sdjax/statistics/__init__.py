"""Statistics of a model on data, for merge methods that see data (`sdjax stats`)."""
