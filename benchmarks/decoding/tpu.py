"""A decode step as the TPU compiler sees it: memory, collectives and bytes, without a TPU.

    JAX_PLATFORMS=cpu python benchmarks/decoding/tpu.py --topology v5e:2x4     # needs sdjax[tpu]

One step of Mistral-7B in bfloat16, greedy, 64 sequences, 2,048 cached tokens, tensor-parallel over
all chips. The least bytes: weights read once, cache read once.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial

import jax
import jax.numpy as jnp

from sdjax.decoding import programs
from sdjax.decoding.state import empty_state, state_sharding
from sdjax.models.config import ModelConfig
from sdjax.models.spec import specify
from sdjax.models.tree import unflatten
from sdjax.planning.topology import Needs, tpu_devices
from sdjax.planning.traffic import by_role, operations
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
    step, weights, cache = lowered(config, mesh, options.slots, options.cached)
    compiled = step.compile()
    needs = Needs.of(compiled)
    least = weights + cache
    print(f"{options.topology}, tensor {len(devices)}, {options.layers} layers, {options.slots} ")
    print(f"sequences, {options.cached} cached; compiled in {time.perf_counter() - start:.0f} s")
    print(f"memory a chip {needs.peak / GB:.2f} GB, of it temporary {needs.temporary / GB:.3f}")
    print(f"collectives {dict(needs.collectives)}")
    print(f"least {least / GB:.3f} GB: weights {weights / GB:.3f}, cache {cache / GB:.3f}")
    print(f"bytes accessed {needs.accessed / GB:.3f} GB, {needs.accessed / least:.2f} of the least")
    entry = cache // (2 * config.num_layers)

    def role(source: str | None, size: int) -> str:
        if source is not None and source.startswith("params"):
            return "weights"
        return "a whole cache" if size >= entry else "the rest"

    for (direction, what), size in sorted(by_role(operations(compiled.as_text()), role).items()):
        print(f"  {direction} {what}: {size / GB:.3f} GB, {size / least:.3f} of the least")


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
        context=32_768,
        eos_tokens=(2,),
    )


def lowered(
    config: ModelConfig, mesh: jax.sharding.Mesh, slots: int, cached: int
) -> tuple[jax.stages.Lowered, int, int]:
    """The step, and the bytes of weights and cache that a chip holds."""

    def spread(shape, sharding, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tree = unflatten(specify(config))
    params = jax.tree.map(
        lambda spec, where: spread(spec.shape, where, jnp.bfloat16), tree, shardings(tree, mesh)
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
    state = jax.tree.map(lambda leaf, at: spread(leaf.shape, at, leaf.dtype), shapes, where)
    step = jax.jit(
        partial(programs.step, config=config),
        donate_argnames="state",
        static_argnames="top_k",
        out_shardings=where,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    stops = jax.ShapeDtypeStruct((1,), jnp.int32)
    made = step.lower(params, None, state, key=key, numbers={}, top_k=None, stops=stops)
    return made, _bytes(params), _bytes(state.cache)


def _bytes(tree) -> int:
    """Bytes of a tree's leaves on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )


if __name__ == "__main__":
    main()
