"""Measure the time to judge and compile a new program.

    python -m benchmarks.merge.one_program

A search generates thousands of programs and uses most of them for a single merge. The sandbox
judges each program for all tensors of a model with the shapes of Mistral-7B (291 tensors at 32
layers). The program is then compiled once per distinct shape, without weights. The cost depends on
the number of distinct shapes, not of layers.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.environment import describe_environment
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.tensor_program import TensorProgram
from sdjax.models.tensor_names import kind_of, parse_name
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature

SLOTS = ("expert_1", "expert_2", "expert_3")
HIDDEN, INNER, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 32000
LAYER = {
    "attn/q_proj": (HIDDEN, HIDDEN),
    "attn/k_proj": (KEY_VALUE, HIDDEN),
    "attn/v_proj": (KEY_VALUE, HIDDEN),
    "attn/o_proj": (HIDDEN, HIDDEN),
    "mlp/gate_proj": (INNER, HIDDEN),
    "mlp/up_proj": (INNER, HIDDEN),
    "mlp/down_proj": (HIDDEN, INNER),
    "input_norm": (HIDDEN,),
    "post_norm": (HIDDEN,),
}
OUTSIDE = {"embed": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
# One constant differs between runs, so that no cache contains a program.
PROGRAMS = {
    "weighted sum": """import jax.numpy as jnp

def merge_models(task_vectors):
    weights = jnp.array([0.{number}, 0.5, 0.3])
    return sum(w * t for w, t in zip(weights, task_vectors.values()))
""",
    "norms and signs": """import jax.numpy as jnp

def merge_models(task_vectors, base):
    stacked = jnp.stack(list(task_vectors.values()))
    norms = jnp.sqrt(jnp.sum(stacked ** 2, axis=tuple(range(1, stacked.ndim)), keepdims=True))
    sign = jnp.sign(jnp.sum(stacked / (norms + 1e-6), axis=0))
    agree = jnp.where(jnp.sign(stacked) == sign, stacked, 0.0)
    return jnp.where(jnp.abs(base) > 0.{number} * jnp.std(base), jnp.mean(agree, axis=0), 0.0)
""",
}


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    stack = {f"layers/{i}/{name}": shape for i in range(layers) for name, shape in LAYER.items()}
    return stack | OUTSIDE


def seconds(
    source: str, shapes: dict[str, tuple[int, ...]], layers: int, sandbox: Sandbox
) -> list[float]:
    """Return the seconds to judge, the seconds to compile, and the number of executables."""
    device = SingleDeviceSharding(jax.devices()[0])
    start = time.perf_counter()
    verdict = sandbox.judge(source)
    judged = time.perf_counter()
    assert verdict.admitted, verdict
    assert verdict.program is not None
    algorithm = to_algorithm(verdict.program, name="new")
    programs = []
    for path, shape in shapes.items():
        leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device)
        programs.append(
            TensorProgram.of(
                algorithm,
                SLOTS,
                leaf,
                (leaf,) * 3,
                path=path,
                depth=parse_name(path).depth(layers),
                key=None,
            )
        )
    cache = CompileCache(quick=True)
    cache.get(programs)
    return [judged - start, time.perf_counter() - judged, float(cache.compiled)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 80])
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print(f"{describe_environment()}\n")
    print("| program | layers | tensors | judge s | compile s | executables | total s (range) |")
    print("|---|---|---|---|---|---|---|")
    for layers in options.layers:
        shapes = shapes_of(layers)
        signature = MergeSignature.of(
            SLOTS, {p: (kind_of(p), shape) for p, shape in shapes.items()}
        )
        with Sandbox(signature) as sandbox:
            for name, text in PROGRAMS.items():
                # The first run also compiles the probe's operations, so it is not counted.
                runs = [
                    seconds(text.replace("{number}", str(11 + number)), shapes, layers, sandbox)
                    for number in range(options.repeat + 1)
                ][1:]
                judged, compiled, count = (
                    statistics.median(column) for column in zip(*runs, strict=True)
                )
                totals = [run[0] + run[1] for run in runs]
                print(
                    f"| {name} | {layers} | {len(shapes)} | {judged:.2f} | {compiled:.2f} "
                    f"| {count:.0f} | {statistics.median(totals):.2f} "
                    f"({min(totals):.2f} to {max(totals):.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
