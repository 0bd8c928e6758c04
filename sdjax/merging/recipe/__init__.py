"""Recipes in mergekit's YAML: schema, plan, and the streamed merge."""
