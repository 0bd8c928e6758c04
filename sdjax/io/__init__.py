"""Safetensors in and out, tokenizers and Orbax checkpoints."""
