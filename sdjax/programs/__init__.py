"""Prompts, extraction of candidates from text, and the grammar of random programs."""
