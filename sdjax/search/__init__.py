"""Preference pairs, the loop, its store and its controls."""
