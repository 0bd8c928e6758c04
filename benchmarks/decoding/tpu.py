"""Measure memory, collectives and bytes per step of decoding compiled for a TPU, without a TPU.

    JAX_PLATFORMS=cpu python -m benchmarks.decoding.tpu --topology v5e:2x4     # needs sdjax[tpu]

The decoding loop (`steps.decode_round`) of Mistral-7B in bfloat16: greedy, 64 sequences, 2,048
cached tokens, tensor parallelism over all chips. The minimum traffic per step is one read of the
weights and the cache.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.planning import traffic
from benchmarks.planning.topology import ResourceUsage, tpu_devices
from sdjax.decoding import steps
from sdjax.decoding.state import init_state, state_sharding
from sdjax.models.config import ModelConfig
from sdjax.models.params import param_specs
from sdjax.models.tree import unflatten
from sdjax.sharding.mesh import make_mesh
from sdjax.sharding.rules import shardings

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--cached", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    devices = tpu_devices(options.topology)
    mesh = make_mesh({"tensor": len(devices)}, devices=devices)
    config = mistral(options.layers)
    start = time.perf_counter()
    round_, weights, cache = lowered(config, mesh, options.slots, options.cached)
    compiled = round_.compile()
    seconds = time.perf_counter() - start
    usage, text = ResourceUsage.of(compiled), compiled.as_text()
    minimum, entry = weights + cache, cache // (2 * config.num_layers)
    print(
        f"{options.topology}, tensor {len(devices)}, jax {jax.__version__}; "
        f"{options.layers} layers, {options.slots} sequences, {options.cached} cached; "
        f"compiled in {seconds:.0f} s\n"
        f"memory per chip {usage.peak / GB:.2f} GB, temporary {usage.temporary / GB:.3f} GB\n"
        f"minimum {minimum / GB:.3f} GB: weights {weights / GB:.3f}, cache {cache / GB:.3f}\n"
        f"bytes accessed according to XLA: {usage.accessed / GB:.3f} GB, "
        f"{usage.accessed / minimum:.2f} times the minimum"
    )
    print("\n| collective | result | count |\n|---|---|---|")
    for (operation, shapes), count in usage.collectives.most_common():
        print(f"| {operation} | {shapes} | {count} |")

    def role(source: str | None, size: int) -> str:
        if source is not None and source.startswith("params"):
            return "weights"
        return "entire caches" if size >= entry else "other"

    print("\n| traffic, GB | per step | relative to the minimum | per call |\n|---|---|---|---|")
    step, call = (
        traffic.sum_by_role(find(text), role)
        for find in (traffic.loop_transfers, traffic.entry_transfers)
    )
    for near, written, what in sorted(step.keys() | call.keys()):
        place = "on-chip memory" if near else "HBM"
        moved = f"{place}: {what} {'written' if written else 'read'}"
        a, b = (sums.get((near, written, what), 0) for sums in (step, call))
        print(f"| {moved} | {a / GB:.3f} | {a / minimum:.2f} | {b / GB:.3f} |")
    chip = sum(size for (near, _, _), size in step.items() if not near)
    print(f"\nHBM traffic per step: {chip / GB:.3f} GB, {chip / minimum:.2f} times the minimum")


def mistral(layers: int) -> ModelConfig:
    return ModelConfig(
        family="mistral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=32_768,
        eos_token_ids=(2,),
    )


def lowered(
    config: ModelConfig, mesh: jax.sharding.Mesh, slots: int, cached: int
) -> tuple[jax.stages.Lowered, int, int]:
    """Return the lowered loop, and the bytes per chip of the weights and of the cache."""

    def sharded_shape(shape, sharding, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tree = unflatten(param_specs(config))
    params = jax.tree.map(
        lambda spec, sharding: sharded_shape(spec.shape, sharding, jnp.bfloat16),
        tree,
        shardings(tree, mesh),
    )
    make_state = partial(
        init_state,
        config,
        slots=slots,
        cache_length=cached,
        max_new_tokens=64,
        dtype=jnp.bfloat16,
        logprobs=False,
    )
    shapes = jax.eval_shape(make_state)
    sharding = state_sharding(shapes, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: sharded_shape(leaf.shape, sharding, leaf.dtype), shapes, sharding
    )
    decode_round = jax.jit(
        partial(steps.decode_round, config=config),
        donate_argnames="state",
        static_argnames="top_k",
        out_shardings=(sharding, None),
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    lowered_round = decode_round.lower(
        params,
        None,
        state,
        occupied=jax.ShapeDtypeStruct((slots,), bool),
        max_active=scalar,
        max_steps=scalar,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        sampling_params={},
        top_k=None,
        stop_token_ids=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    return lowered_round, _bytes(params), _bytes(state.cache)


def _bytes(tree) -> int:
    """Return the bytes that a pytree's leaves take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )


if __name__ == "__main__":
    main()
