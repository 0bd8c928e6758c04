"""Decoding as the TPU compiler sees it: memory, collectives and bytes a step, without a TPU.

    JAX_PLATFORMS=cpu python -m benchmarks.decoding.tpu --topology v5e:2x4     # needs sdjax[tpu]

The decoder's loop (`steps.advance`) for Mistral-7B in bfloat16, greedy, 64 sequences, 2,048
cached tokens, tensor-parallel over all chips. The least bytes a step: weights read once, cache read
once.
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
from sdjax.decoding.state import empty_state, state_sharding
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
    program, weights, cache = lowered(config, mesh, options.slots, options.cached)
    compiled = program.compile()
    seconds = time.perf_counter() - start
    needs, text = ResourceUsage.of(compiled), compiled.as_text()
    least, entry = weights + cache, cache // (2 * config.num_layers)
    print(
        f"{options.topology}, tensor {len(devices)}, jax {jax.__version__}; "
        f"{options.layers} layers, {options.slots} sequences, {options.cached} cached; "
        f"compiled in {seconds:.0f} s\n"
        f"memory a chip {needs.peak / GB:.2f} GB, of it temporary {needs.temporary / GB:.3f}\n"
        f"least {least / GB:.3f} GB: weights {weights / GB:.3f}, cache {cache / GB:.3f}\n"
        f"bytes accessed, as XLA counts: {needs.accessed / GB:.3f} GB, "
        f"{needs.accessed / least:.2f} of the least"
    )
    print("\n| collective | result | in the program |\n|---|---|---|")
    for (operation, shapes), count in needs.collectives.most_common():
        print(f"| {operation} | {shapes} | {count} |")

    def role(source: str | None, size: int) -> str:
        if source is not None and source.startswith("params"):
            return "weights"
        return "whole caches" if size >= entry else "the rest"

    print("\n| memory, GB | a step | of the least | a call besides |\n|---|---|---|---|")
    step, call = (
        traffic.sum_by_role(find(text), role)
        for find in (traffic.loop_transfers, traffic.entry_transfers)
    )
    for near, written, what in sorted(step.keys() | call.keys()):
        place = "beside the units" if near else "of the chip"
        moved = f"{place}: {what} {'written' if written else 'read'}"
        a, b = (sums.get((near, written, what), 0) for sums in (step, call))
        print(f"| {moved} | {a / GB:.3f} | {a / least:.2f} | {b / GB:.3f} |")
    chip = sum(size for (near, _, _), size in step.items() if not near)
    print(f"\nof the chip's memory, a step: {chip / GB:.3f} GB, {chip / least:.2f} of the least")


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
    """The loop, and the bytes of weights and cache that a chip holds."""

    def shard_adapter(shape, sharding, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tree = unflatten(param_specs(config))
    params = jax.tree.map(
        lambda spec, where: shard_adapter(spec.shape, where, jnp.bfloat16),
        tree,
        shardings(tree, mesh),
    )
    empty = partial(
        empty_state,
        config,
        slots=slots,
        cached=cached,
        max_new_tokens=64,
        dtype=jnp.bfloat16,
        logprobs=False,
    )
    shapes = jax.eval_shape(empty)
    where = state_sharding(shapes, mesh)
    state = jax.tree.map(lambda leaf, at: shard_adapter(leaf.shape, at, leaf.dtype), shapes, where)
    advance = jax.jit(
        partial(steps.advance, config=config),
        donate_argnames="state",
        static_argnames="top_k",
        out_shardings=(where, None),
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)
    made = advance.lower(
        params,
        None,
        state,
        owned=jax.ShapeDtypeStruct((slots,), bool),
        enough=number,
        most_steps=number,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        numbers={},
        top_k=None,
        stops=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    return made, _bytes(params), _bytes(state.cache)


def _bytes(tree) -> int:
    """Bytes of a tree's leaves on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )


if __name__ == "__main__":
    main()
