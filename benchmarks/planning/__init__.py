"""Compile-only measurements: what a program needs on an accelerator that is not present."""
