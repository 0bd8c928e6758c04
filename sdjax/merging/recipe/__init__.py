"""Recipes in mergekit's YAML: schema, plan, and the streamed merge from disk to disk."""
