"""Source text in, a verified array program out."""
