"""Batched decoding with a fixed number of slots: state, compiled steps, scheduling and sampling.

`sdjax.models.types` defines the axis names of the shape annotations.
"""
