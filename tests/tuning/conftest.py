"""Tiny Llama checkpoints that tests of recipes and families merge."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.tuning.model_set import ModelSet

NUM_LAYERS = 3
SHAPES = {"model.embed_tokens.weight": (5, 4), "model.norm.weight": (4,), "lm_head.weight": (5, 4)}
for _layer in range(NUM_LAYERS):
    SHAPES |= {
        f"model.layers.{_layer}.mlp.up_proj.weight": (6, 4),
        f"model.layers.{_layer}.mlp.gate_up_proj.weight": (6, 4),
        f"model.layers.{_layer}.self_attn.q_proj.weight": (6, 4),
    }


@pytest.fixture(params=["float32", "bfloat16"])
def folders(request, tmp_path):
    """Write a base and two experts; return the folder that contains them."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for model, noise in (("base", 0.0), ("math", 0.1), ("code", 0.3)):
        tensors = {
            name: np.asarray(x + noise * rng.standard_normal(x.shape)).astype(
                jnp.dtype(request.param)
            )
            for name, x in base.items()
        }
        (tmp_path / model).mkdir()
        save_file(tensors, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / model / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / model / "tokenizer.json").write_text('"same"')
    return tmp_path


@pytest.fixture
def tensors():
    """Return a function that reads the tensors of a folder."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        merged: dict[str, np.ndarray] = {}
        for file in sorted(folder.glob("*.safetensors")):
            merged |= load_file(file)
        return merged

    return read


@pytest.fixture
def model_set():
    """Return a function that describes the models of `folders`."""

    def describe(**changes) -> ModelSet:
        fields = {
            "base": "base",
            "experts": {"expert_1": "math", "expert_2": "code"},
            "paths": tuple(SHAPES),
            **changes,
        }
        return ModelSet(**fields)

    return describe
