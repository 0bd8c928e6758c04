"""What each family's parameters are called, and that every tool finds them by those names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.merging.recipe.source_models import tensor_path
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.families import FAMILIES
from sdjax.models.params import (
    LAYER_TENSORS,
    abstract_params,
    init_params,
    kind_of,
    layer_tensors,
    param_specs,
)
from sdjax.models.tree import flatten


def tiny(family: str) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        max_seq_len=32,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_scope_is_the_mlp_and_names_lead_back_to_paths(family):
    specs = param_specs(tiny(family))
    first = "gate_up_proj" if family == "phi3" else "gate_proj"
    kinds = {kind_of(path) for path in select_paths(specs, "mlp")}
    assert kinds == {"mlp.down_proj", f"mlp.{first}"} | (
        set() if family == "phi3" else {"mlp.up_proj"}
    )
    for path, spec in specs.items():
        assert tensor_path(spec.hf_name) == path
        assert len(spec.axes) == len(spec.shape)


def test_every_tensor_of_the_table_belongs_to_a_family():
    used = {name for family in FAMILIES.values() for name in layer_tensors(family)}
    assert used == set(LAYER_TENSORS)
    names = [hf_name for hf_name, _ in LAYER_TENSORS.values()]
    assert len(set(names)) == len(names)


def test_fused_projections_are_one_leaf():
    shapes = {path: spec.shape for path, spec in param_specs(tiny("phi3")).items()}
    assert shapes["layers/0/attn/qkv_proj"] == (4 * 6 + 2 * 2 * 6, 16)
    assert shapes["layers/0/mlp/gate_up_proj"] == (48, 16)
    assert not any(name in path for path in shapes for name in ("q_proj", "/up_proj", "gate_proj"))


@pytest.mark.parametrize(("family", "scale"), [("qwen2", 1), ("gemma2", 0)])
def test_norms_start_at_one_and_biases_at_zero(family, scale):
    leaves = flatten(init_params(tiny(family), jax.random.key(0), jnp.float32))
    for path, leaf in leaves.items():
        if "norm" in path:
            np.testing.assert_array_equal(leaf, scale)
        elif "bias" in path:
            np.testing.assert_array_equal(leaf, 0)
        else:
            assert 0 < np.std(leaf) < 0.03, path


def test_merging_knows_the_kinds_of_fused_projections():
    config = tiny("phi3")
    rng = np.random.default_rng(0)
    seed, expert = (
        jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32),
            abstract_params(config, jnp.float32),
        )
        for _ in range(2)
    )

    def merge_models(task_vectors, kind):
        share = {"mlp.gate_up_proj": 0.5, "mlp.down_proj": 0.25}[kind]
        return share * task_vectors["expert_1"]

    merged = flatten(sdjax.merge(seed, [expert], merge_models).params)
    other = flatten(expert)
    for path, leaf in flatten(seed).items():
        share = {"gate_up_proj": 0.5, "down_proj": 0.25}.get(path.split("/")[-1], 0)
        np.testing.assert_allclose(merged[path], leaf + share * (other[path] - leaf), atol=1e-6)
