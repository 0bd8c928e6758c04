"""LoRA adapters: initialization as the identity, and equality of merging and applying."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sdjax.models.lora import ALL_PROJECTIONS, init_adapter, merge_lora, shard_adapter
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten
from sdjax.sharding.mesh import make_mesh
from sdjax.testing import random_params, tiny_config

CONFIG = tiny_config("mistral", sliding_window=4)
FUSED = dataclasses.replace(CONFIG, family="phi3")
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 64, (2, 7)))


@functools.partial(jax.jit, static_argnames="config")
def logits(params, adapter, config=CONFIG):
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    hidden, _ = forward(params, adapter, TOKENS, config=config, positions=positions)
    return unembed(params, hidden, config=config)


def with_random_b(adapter):
    """Return the adapter with random factors, as after training."""
    leaves, tree = jax.tree.flatten(adapter)
    rng = np.random.default_rng(9)
    return tree.unflatten(
        [jnp.asarray(leaf + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    )


def test_new_adapter_leaves_the_model_unchanged():
    params = random_params(CONFIG)
    adapter = init_adapter(CONFIG, jax.random.key(1), rank=3, alpha=6)
    # XLA may fuse the two executables differently.
    np.testing.assert_allclose(logits(params, adapter), logits(params, None), atol=1e-6)
    merged = flatten(merge_lora(params, adapter))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(merged[path], leaf)


@pytest.mark.parametrize(
    ("config", "target_modules"),
    [
        (CONFIG, ALL_PROJECTIONS),
        (CONFIG, ("mlp.down_proj",)),
        (CONFIG, ("attn.q_proj",)),
        (FUSED, ALL_PROJECTIONS),
    ],
)
def test_merging_equals_applying(config, target_modules):
    adapter = with_random_b(
        init_adapter(config, jax.random.key(1), rank=3, alpha=6, target_modules=target_modules)
    )
    params = random_params(config)
    applied = logits(params, adapter, config)
    assert np.abs(applied - logits(params, None, config)).max() > 1e-3
    np.testing.assert_allclose(
        logits(merge_lora(params, adapter), None, config), applied, atol=1e-4
    )


def test_only_target_modules_get_factors():
    adapter = init_adapter(
        CONFIG, jax.random.key(1), rank=3, alpha=6, target_modules=("attn.v_proj", "mlp.up_proj")
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
    params = random_params(CONFIG)
    merged = flatten(merge_lora(params, with_random_b(adapter)))
    changed = {
        path for path, leaf in flatten(params).items() if not np.array_equal(leaf, merged[path])
    }
    expected = {f"layers/{layer}/{n}" for layer in range(2) for n in ("attn/v_proj", "mlp/up_proj")}
    assert changed == expected


def test_merging_keeps_the_dtype():
    adapter = with_random_b(init_adapter(CONFIG, jax.random.key(1), rank=3, alpha=6))
    merged = merge_lora(random_params(CONFIG, dtype=jnp.bfloat16), adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_factors_are_sharded_like_their_projection():
    adapter = with_random_b(init_adapter(CONFIG, jax.random.key(1), rank=4, alpha=8))
    mesh = make_mesh({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    sharded = flatten(shard_adapter(adapter, CONFIG, mesh).factors)
    assert sharded["layers/0/mlp/up_proj/a"].sharding.spec == PartitionSpec(None, "fsdp")
    assert sharded["layers/0/mlp/up_proj/b"].sharding.spec == PartitionSpec("tensor", None)
    assert sharded["layers/1/mlp/down_proj/a"].sharding.spec == PartitionSpec(None, "tensor")
    for path, leaf in flatten(adapter.factors).items():
        np.testing.assert_array_equal(sharded[path], leaf)
    fused = flatten(
        shard_adapter(init_adapter(FUSED, jax.random.key(1), rank=4, alpha=8), FUSED, mesh).factors
    )
    assert fused["layers/0/mlp/gate_up_proj/b"].sharding.spec == PartitionSpec("tensor", None)
