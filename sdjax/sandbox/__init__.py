"""Sandbox for untrusted candidates: from source text to a verified array program."""
