"""Tiny trained models that ship with the package, and how they are trained."""
