"""Workarounds for the compiler and the allocator."""
