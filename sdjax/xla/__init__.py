"""Workarounds for XLA, glibc and Python, each with what it works around."""
