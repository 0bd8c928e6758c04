"""Tiny models to merge by recipes."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # makes `small_models` importable

from small_models import SAME, SHAPES


@pytest.fixture
def models(tmp_path):
    """Write a base and two experts in bfloat16; return their tensors by model."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    out = {}
    for name, noise in [("base", 0.0), ("math", 0.1), ("code", 0.3)]:
        tensors = {
            n: (x + (0 if n == SAME else noise) * rng.standard_normal(x.shape)).astype(
                ml_dtypes.bfloat16
            )
            for n, x in base.items()
        }
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}))
        (folder / "tokenizer.json").write_text(f'"{name}"')
        (folder / "generation_config.json").write_text("{}")
        out[name] = tensors
    return out
