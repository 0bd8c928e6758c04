"""Tasks, one per module."""
