"""The commands of `sdjax`; JAX is imported only by those that run."""
