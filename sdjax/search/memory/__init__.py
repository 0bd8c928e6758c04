"""Prompts with memory: which programs of earlier iterations a prompt shows."""
