"""Measure in-memory throughput of merge methods relative to the device's copy bandwidth.

    python -m benchmarks.merge_throughput --model 135m --methods task_arithmetic,ties --repeat 5

The number of bytes is the minimum for a merge: one read of base and experts, one write of the
result. The copy reads and writes a float32 array once, into a fresh buffer (like a merge) and into
a reused one. Compilation is reported separately. Tensors are random, with the shapes of a Llama
model of the given size (7b-layer: one layer of Mistral-7B), on JAX's default device.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import describe_environment
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger
from sdjax.merging.methods.registry import algorithm, methods
from sdjax.merging.operations.random import uniform
from sdjax.models.tree import unflatten

# Layers, hidden size, intermediate size, width of the key and value projections, vocabulary.
MODELS = {
    "small": (4, 128, 512, 64, 1024),
    "135m": (30, 576, 1536, 192, 49152),
    "1b": (22, 2048, 5632, 256, 32000),
    "7b-layer": (1, 4096, 14336, 1024, 0),
}
DEFAULT_METHODS = "linear,task_arithmetic,slerp,model_stock,dare_linear,ties,dare_ties"


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix of the model by path."""
    layers, hidden, inner, key_value, vocabulary = MODELS[model]
    out: dict[str, tuple[int, ...]] = {"embed": (vocabulary, hidden)} if vocabulary else {}
    for layer in range(layers):
        for name, shape in {
            "attn/q_proj": (hidden, hidden),
            "attn/k_proj": (key_value, hidden),
            "attn/v_proj": (key_value, hidden),
            "attn/o_proj": (hidden, hidden),
            "mlp/gate_proj": (inner, hidden),
            "mlp/up_proj": (inner, hidden),
            "mlp/down_proj": (hidden, inner),
        }.items():
            out[f"layers/{layer}/{name}"] = shape
    return out


def random_trees(model: str, experts: int, dtype: Any) -> list[dict]:
    """Return a base and its experts, which differ from it by 5% of its magnitude."""

    def draw(key: jax.Array, shape: tuple[int, ...], near: jax.Array | None) -> jax.Array:
        noise = 2 * uniform(key, shape) - 1
        return (noise if near is None else near + 0.05 * noise).astype(dtype)

    make = jax.jit(draw, static_argnums=1)
    base = {}
    trees: list[dict] = [{} for _ in range(experts)]
    for i, (path, shape) in enumerate(shapes_of(model).items()):
        base[path] = make(jax.random.key(i), shape, None)
        for j, tree in enumerate(trees):
            tree[path] = make(jax.random.key(1000 * (j + 1) + i), shape, base[path])
    return [unflatten(base), *(unflatten(tree) for tree in trees)]


def timed(run: Callable[[], Any], repeat: int) -> list[float]:
    """Return the seconds that each call takes until its result is ready on the device."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def merged_params(merger: Merger, method: Algorithm, key: jax.Array) -> dict:
    """Merge once."""
    return merger(method, key=key).params


def copy_rates(megabytes: int, repeat: int) -> tuple[list[float], list[float]]:
    """Return the copy bandwidth in GB/s (reads plus writes) for a fresh and for a reused buffer."""
    held = [jnp.ones((megabytes, 2**18), jnp.float32)]
    fresh = jax.jit(lambda x: x * 2)
    reused = jax.jit(lambda x: x * 0.5, donate_argnums=0)

    def in_place() -> jax.Array:
        held[0] = reused(held[0])
        return held[0]

    moved = 2 * held[0].nbytes / 1e9
    jax.block_until_ready(fresh(held[0]))
    jax.block_until_ready(in_place())
    first = [moved / s for s in timed(lambda: fresh(held[0]), repeat)]
    return first, [moved / s for s in timed(in_place, repeat)]


def spread(rates: list[float]) -> str:
    """Format the median and the range of rates."""
    return f"{statistics.median(rates):7.2f} GB/s  ({min(rates):.2f} to {max(rates):.2f})"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="135m")
    parser.add_argument("--methods", default=DEFAULT_METHODS, help="names separated by commas")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--scope", default="all", help="all, mlp, attention or a glob")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--copy-megabytes", type=int, default=256)
    options = parser.parse_args()
    names = options.methods.split(",")
    unknown = sorted(set(names) - set(methods()))
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; use one of {', '.join(methods())}")

    print(f"{describe_environment('numpy')}; {len(jax.devices())} {jax.devices()[0].device_kind}")
    fresh, reused = copy_rates(options.copy_megabytes, options.repeat)
    print(f"copy of {options.copy_megabytes} MiB, fresh buffer   {spread(fresh)}")
    print(f"copy of {options.copy_megabytes} MiB, reused buffer  {spread(reused)}")

    base, *experts = random_trees(options.model, options.experts, jnp.dtype(options.dtype))
    merger = Merger(base, experts, scope=options.scope, compile_cache=CompileCache())
    shapes = shapes_of(options.model)
    size = sum(int(np.prod(shapes[path])) for path in merger.paths)
    gigabytes = size * jnp.dtype(options.dtype).itemsize * (options.experts + 2) / 1e9
    print(
        f"{options.model}: {len(merger.paths)} tensors, {size / 1e6:.1f}M elements in scope "
        f"{options.scope}, {options.experts} experts, {options.dtype}; at least "
        f"{gigabytes:.3f} GB per merge; median of {options.repeat} and range"
    )
    print(f"{'method':<18}{'compile':>9}{'merge':>9}   rate, relative to a fresh copy")
    for name in names:
        method, key = algorithm(name), jax.random.key(0)
        compiled = merger.compile_cache.compiled
        run = functools.partial(merged_params, merger, method, key)
        (first,) = timed(run, 1)
        seconds = timed(run, options.repeat)
        median = statistics.median(seconds)
        rates = [gigabytes / s for s in seconds]
        print(
            f"{name:<18}{first - median:>7.2f} s{median:>7.3f} s {spread(rates)}"
            f"  {statistics.median(rates) / statistics.median(fresh):5.0%}"
            f"  {merger.compile_cache.compiled - compiled} executables",
            flush=True,
        )


if __name__ == "__main__":
    main()
