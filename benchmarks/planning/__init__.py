"""Compile-only measurements of executables for an accelerator that is not present."""
