"""Confined, killable worker processes."""
