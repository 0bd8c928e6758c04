"""Prompts for candidates, their extraction from text, and the grammar of random programs."""
