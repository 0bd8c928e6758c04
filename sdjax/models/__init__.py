"""Decoder-only transformers: configs, parameter specifications, forward pass and LoRA adapters.

`sdjax.models.types` defines the axis names of the shape annotations.
"""
