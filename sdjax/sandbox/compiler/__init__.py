"""Confined side that compiles and runs verified programs for the first time."""
