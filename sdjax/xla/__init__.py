"""Workarounds for slow or missing behavior of XLA, glibc and Python, each with its reason."""
