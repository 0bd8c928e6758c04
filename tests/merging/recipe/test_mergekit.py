"""Parity with mergekit 0.1.5 on recipes: the same tensors, config and vocabulary.

`mergekit/make_references.py` generates the models and mergekit's results.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sdjax.io.vocabulary import read_vocabulary
from sdjax.merging.recipe.pipeline import merge_recipe

HERE = Path(__file__).parent / "mergekit"
# Relative to the largest element of the merged delta, or of the tensor if there is no base.
TOLERANCE = 1e-5
RECIPES = sorted(path.stem for path in (HERE / "recipes").glob("*.yaml"))


def read(file):
    with safe_open(file, framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, (opened.metadata() or {}).get("facts")


@pytest.fixture(autouse=True)
def among_the_models(monkeypatch):
    monkeypatch.chdir(HERE / "models")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_matches_mergekit(tmp_path, name):
    merge_recipe(HERE / "recipes" / f"{name}.yaml", tmp_path / "out")
    got, _ = read(tmp_path / "out" / "model.safetensors")
    expected, facts = read(HERE / "references" / f"{name}.safetensors")
    base, _ = read(HERE / "models" / "base" / "model.safetensors")
    assert got.keys() == expected.keys()
    based = "base_model: base" in (HERE / "recipes" / f"{name}.yaml").read_text()
    rounding = 2.0**-8 if name == "task_arithmetic_normalized" else 0.0  # written in bfloat16
    for tensor, want in expected.items():
        actual = np.asarray(got[tensor], np.float64)
        assert actual.shape == want.shape, tensor
        at = base.get(tensor)
        relative = based and at is not None and at.shape == want.shape
        delta = want - at if relative else want
        # One float32 rounding step is always allowed.
        bound = TOLERANCE * np.abs(delta).max() + rounding * np.abs(want) + np.spacing(np.abs(want))
        assert np.all(np.abs(actual - want) <= bound), (tensor, np.abs(actual - want).max(), bound)
    facts = json.loads(facts)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == facts["num_hidden_layers"]
    assert config["vocab_size"] == facts["vocab_size"]
    assert config["tie_word_embeddings"] == facts["tie_word_embeddings"]
    vocabulary = read_vocabulary(tmp_path / "out")
    assert sorted(vocabulary, key=vocabulary.__getitem__) == facts["tokens"]
