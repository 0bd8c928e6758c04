"""Safetensors reading and writing, tokenizers and Orbax checkpoints."""
