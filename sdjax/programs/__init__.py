"""Prompts, program extraction and the grammar of random programs."""
