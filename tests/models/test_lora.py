"""LoRA adapters: a fresh one changes nothing, and folding in equals applying."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sdjax.models.config import ModelConfig
from sdjax.models.lora import ALL_PROJECTIONS, init_adapter, merge_lora, shard_adapter
from sdjax.models.params import abstract_params
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten
from sdjax.sharding.mesh import make_mesh

CONFIG = ModelConfig(
    family="mistral",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=32,
    sliding_window=4,
)
FUSED = dataclasses.replace(CONFIG, family="phi3")
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 64, (2, 7)))


def params(dtype=jnp.float32, config=CONFIG):
    """Parameters from NumPy: drawing them with JAX takes seconds of compilation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            0.1 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), leaf.dtype
        ),
        abstract_params(config, dtype),
    )


@functools.partial(jax.jit, static_argnames="config")
def logits(weights, adapter, config=CONFIG):
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    hidden, _ = forward(weights, adapter, TOKENS, config=config, positions=positions)
    return unembed(weights, hidden, config=config)


def trained(adapter):
    """The adapter with B filled in, as training would."""
    leaves, tree = jax.tree.flatten(adapter)
    rng = np.random.default_rng(9)
    return tree.unflatten(
        [jnp.asarray(leaf + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    )


def test_a_fresh_adapter_changes_nothing():
    fresh = init_adapter(CONFIG, jax.random.key(1), rank=3, alpha=6)
    # Two programs, which XLA may fuse differently.
    np.testing.assert_allclose(logits(params(), fresh), logits(params(), None), atol=1e-6)
    folded = flatten(merge_lora(params(), fresh))
    for path, leaf in flatten(params()).items():
        np.testing.assert_array_equal(folded[path], leaf)


@pytest.mark.parametrize(
    ("config", "projections"),
    [
        (CONFIG, ALL_PROJECTIONS),
        (CONFIG, ("mlp.down_proj",)),
        (CONFIG, ("attn.q_proj",)),
        (FUSED, ALL_PROJECTIONS),
    ],
)
def test_folding_in_equals_applying(config, projections):
    adapter = trained(
        init_adapter(config, jax.random.key(1), rank=3, alpha=6, projections=projections)
    )
    weights = params(config=config)
    applied = logits(weights, adapter, config)
    assert np.abs(applied - logits(weights, None, config)).max() > 1e-3
    np.testing.assert_allclose(
        logits(merge_lora(weights, adapter), None, config), applied, atol=1e-4
    )


def test_only_the_chosen_projections_get_factors():
    adapter = init_adapter(
        CONFIG, jax.random.key(1), rank=3, alpha=6, projections=("attn.v_proj", "mlp.up_proj")
    )
    shapes = {path: leaf.shape for path, leaf in flatten(adapter.factors).items()}
    assert shapes == {
        f"layers/{layer}/{name}/{factor}": shape
        for layer in range(2)
        for name, factor, shape in (
            ("attn/v_proj", "a", (3, 16)),
            ("attn/v_proj", "b", (16, 3)),
            ("mlp/up_proj", "a", (3, 16)),
            ("mlp/up_proj", "b", (24, 3)),
        )
    }
    changed = merge_lora(params(), trained(adapter))
    before = flatten(params())
    different = {
        path for path, leaf in flatten(changed).items() if not np.array_equal(leaf, before[path])
    }
    expected = {f"layers/{layer}/{n}" for layer in range(2) for n in ("attn/v_proj", "mlp/up_proj")}
    assert different == expected


def test_folding_keeps_the_stored_dtype():
    adapter = trained(init_adapter(CONFIG, jax.random.key(1), rank=3, alpha=6))
    folded = merge_lora(params(jnp.bfloat16), adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


def test_spread_over_a_mesh_the_factors_are_split_as_their_projection():
    fresh = trained(init_adapter(CONFIG, jax.random.key(1), rank=4, alpha=8))
    mesh = make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    placed = flatten(shard_adapter(fresh, CONFIG, mesh).factors)
    assert placed["layers/0/mlp/up_proj/a"].sharding.spec == PartitionSpec(None, "fsdp")
    assert placed["layers/0/mlp/up_proj/b"].sharding.spec == PartitionSpec("tensor", None)
    assert placed["layers/1/mlp/down_proj/a"].sharding.spec == PartitionSpec(None, "tensor")
    for path, leaf in flatten(fresh.factors).items():
        np.testing.assert_array_equal(placed[path], leaf)
    fused = flatten(
        shard_adapter(init_adapter(FUSED, jax.random.key(1), rank=4, alpha=8), FUSED, mesh).factors
    )
    assert fused["layers/0/mlp/gate_up_proj/b"].sharding.spec == PartitionSpec("tensor", None)
