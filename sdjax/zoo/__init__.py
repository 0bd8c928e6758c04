"""Tiny trained models that ship with the package, and their training code."""
