"""Parameter names of each family, and agreement of all modules on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.merging.scope import select_paths
from sdjax.models.families import FAMILIES
from sdjax.models.params import (
    LAYER_TENSORS,
    init_params,
    kind_of,
    layer_tensors,
    param_specs,
)
from sdjax.models.tensor_names import parse_name
from sdjax.models.tree import flatten
from sdjax.testing import random_params, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_default_scope_is_the_mlp_and_hf_names_map_back_to_paths(family):
    specs = param_specs(tiny_config(family))
    first = "gate_up_proj" if family == "phi3" else "gate_proj"
    kinds = {kind_of(path) for path in select_paths(specs, "mlp")}
    assert kinds == {"mlp.down_proj", f"mlp.{first}"} | (
        set() if family == "phi3" else {"mlp.up_proj"}
    )
    for path, spec in specs.items():
        assert parse_name(spec.hf_name).path == path
        assert len(spec.axes) == len(spec.shape)


def test_every_layer_tensor_belongs_to_a_family():
    used = {name for family in FAMILIES.values() for name in layer_tensors(family)}
    assert used == set(LAYER_TENSORS)
    names = [hf_name for hf_name, _ in LAYER_TENSORS.values()]
    assert len(set(names)) == len(names)


def test_fused_projections_are_single_leaves():
    shapes = {path: spec.shape for path, spec in param_specs(tiny_config("phi3")).items()}
    assert shapes["layers/0/attn/qkv_proj"] == (4 * 8 + 2 * 2 * 8, 16)
    assert shapes["layers/0/mlp/gate_up_proj"] == (48, 16)
    assert not any(name in path for path in shapes for name in ("q_proj", "/up_proj", "gate_proj"))


@pytest.mark.parametrize(("family", "scale"), [("qwen2", 1), ("gemma2", 0)])
def test_norms_start_as_identity_and_biases_at_zero(family, scale):
    leaves = flatten(init_params(tiny_config(family), jax.random.key(0), jnp.float32))
    for path, leaf in leaves.items():
        if "norm" in path:
            np.testing.assert_array_equal(leaf, scale)
        elif "bias" in path:
            np.testing.assert_array_equal(leaf, 0)
        else:
            assert 0 < np.std(leaf) < 0.03, path


def test_merging_passes_the_kinds_of_fused_projections():
    config = tiny_config("phi3")
    seed, expert = (random_params(config, seed=seed) for seed in range(2))

    def merge_models(task_vectors, kind):
        weight = {"mlp.gate_up_proj": 0.5, "mlp.down_proj": 0.25}[kind]
        return weight * task_vectors["expert_1"]

    merged = flatten(sdjax.merge(seed, [expert], merge_models, scope="mlp").params)
    expert_leaves = flatten(expert)
    for path, leaf in flatten(seed).items():
        weight = {"gate_up_proj": 0.5, "down_proj": 0.25}.get(path.split("/")[-1], 0)
        expected = leaf + weight * (expert_leaves[path] - leaf)
        np.testing.assert_allclose(merged[path], expected, atol=1e-6)
