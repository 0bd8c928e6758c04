"""The algorithm API, the engine that maps it over a model, and recipes."""
