"""Measure memory per chip of a tuning step compiled for a TPU, without a TPU.

    JAX_PLATFORMS=cpu python -m benchmarks.tuning.tpu --topology v5e:4x4    # needs sdjax[tpu]

The step tunes a merge of three experts into the MLPs of Mistral-7B in bfloat16: the gradient of the
model's loss in the merged tensors, which is one executable, and the gradient of the merge, which is
one executable per shape. Weights are sharded by their specs, and the rows over `fsdp`.
`--layers 1,2` compiles models of one and of two layers and extrapolates to 32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decoding.tpu import mistral
from benchmarks.environment import describe_environment
from benchmarks.planning.topology import ResourceUsage, tpu_devices
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import default_slots
from sdjax.merging.merge_gradient import MergeGradient
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.scope import select_paths
from sdjax.merging.tensor_program import TensorProgram
from sdjax.models.params import param_specs
from sdjax.sharding.mesh import make_mesh
from sdjax.sharding.rules import sharding_of
from sdjax.tuning.loss import rows_per_part
from sdjax.tuning.model_gradient import ModelGradient

GB, LAYERS, EXPERTS = 1e9, 32, 3
PARTS = ("arguments", "outputs", "aliased", "temporary", "peak")


def discovered(
    task_vectors: Mapping[str, jax.Array],
    depth: jax.Array,
    a: float = 0.7,
    b: float = 0.9,
    c: float = 0.6,
    d: float = 0.1,
    e: float = 2.0,
) -> jax.Array:
    """Merge like a program that a search finds: five constants, clipping and the depth."""
    first, second, third = task_vectors.values()
    limit = e * jnp.std(first)
    return (
        a * jnp.clip(first, -limit, limit)
        + b * second
        + jnp.where(depth < 0.5, c, d) * jnp.tanh(third / limit) * limit
    )


class Shapes:
    """Shapes and shardings of a model's tensors and of a batch."""

    def __init__(self, mesh: jax.sharding.Mesh, layers: int) -> None:
        self.config, self.mesh = mistral(layers), mesh
        self.leaves = {
            path: jax.ShapeDtypeStruct(
                spec.shape, jnp.bfloat16, sharding=sharding_of(spec.shape, spec.axes, mesh)
            )
            for path, spec in param_specs(self.config).items()
        }
        paths = set(select_paths(list(self.leaves), "mlp"))
        self.scope = {path: x for path, x in self.leaves.items() if path in paths}
        self.others = {path: x for path, x in self.leaves.items() if path not in paths}

    def batch(self, rows: int, length: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Return the parts of a batch of packed rows, whose tokens may all be targets."""
        devices = self.mesh.shape["fsdp"]
        part = rows_per_part(rows, length, devices)
        spec = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec("fsdp"))

        def array(shape: tuple[int, int], dtype: type) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

        tokens, targets = (part, length), (devices, part // devices * (length - 1))
        return [
            {name: array(tokens, np.int32) for name in ("tokens", "positions", "segments")}
            | {"target_index": array(targets, np.int32), "weights": array(targets, np.float32)}
            for _ in range(rows // part)
        ]


def per_chip(tree: Mapping[str, jax.ShapeDtypeStruct], itemsize: int = 2) -> int:
    """Return the bytes of some tensors on one chip."""
    return sum(itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in tree.values())


def model_row(mesh: jax.sharding.Mesh, layers: int, rows: int, length: int) -> dict[str, float]:
    """Compile the model's gradient; print and return its memory per chip in GB."""
    shapes = Shapes(mesh, layers)
    batch = shapes.batch(rows, length)
    described = ModelGradient.of(
        shapes.config, shapes.scope, shapes.others, batch, compute_dtype=jnp.bfloat16
    )
    start = time.perf_counter()
    usage = ResourceUsage.of(described.lower().compile())
    found = {name: getattr(usage, name) / GB for name in PARTS}
    seconds = time.perf_counter() - start
    print_row(f"model, {layers} layers, {len(batch)} parts", found, seconds)
    return found


def merge_rows(mesh: jax.sharding.Mesh) -> None:
    """Compile merges of one tensor and their gradients; print their memory per chip."""
    shapes, slots = Shapes(mesh, 1), default_slots(EXPERTS)
    for method in (algorithm("task_arithmetic"), Algorithm.from_function(discovered)):
        for path in ("layers/0/mlp/up_proj", "layers/0/mlp/down_proj"):
            tensor = shapes.scope[path]
            arguments = (method, slots, tensor, (tensor,) * EXPERTS)
            place = {"path": path, "depth": 0.5, "key": None}
            merge = TensorProgram.of(*arguments, **place)
            gradient = MergeGradient.of_tensor(*arguments, **place)
            for what, computation in (("merge", merge), ("gradient", gradient)):
                start = time.perf_counter()
                usage = ResourceUsage.of(computation.lower().compile())
                found = {name: getattr(usage, name) / GB for name in PARTS}
                title = f"{what} of {path.rpartition('/')[2]}, {method.name}"
                print_row(title, found, time.perf_counter() - start)


def print_row(title: str, found: Mapping[str, float], seconds: float | None = None) -> None:
    compiled = "" if seconds is None else f"{seconds:.0f}"
    cells = " | ".join(f"{found[name]:.3f}" for name in PARTS)
    print(f"| {title} | {cells} | {compiled} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--tensor", type=int, default=4, help="size of the mesh's tensor axis")
    parser.add_argument("--layers", default=str(LAYERS), help="or two numbers to extrapolate from")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    devices = tpu_devices(options.topology)
    mesh = make_mesh({"fsdp": -1, "tensor": options.tensor}, devices=devices)
    print(
        f"{options.topology}, {dict(mesh.shape)}; {describe_environment('libtpu')}\n"
        f"Mistral-7B in bfloat16, {EXPERTS} experts, "
        f"{options.rows} rows of {options.length} tokens\n"
    )
    print(f"| GB per chip | {' | '.join(PARTS)} | compile s |\n|---|{'---|' * (len(PARTS) + 1)}")
    merge_rows(mesh)
    layers = [int(number) for number in options.layers.split(",")]
    found = [model_row(mesh, count, options.rows, options.length) for count in layers]
    step = found[0]
    if len(found) > 1:
        slope = (LAYERS - layers[0]) / (layers[1] - layers[0])
        step = {name: x + slope * (found[1][name] - x) for name, x in found[0].items()}
        print_row(f"model, {LAYERS} layers, extrapolated", step)
    full = Shapes(mesh, LAYERS if len(found) > 1 else layers[0])
    kept = (1 + EXPERTS) * per_chip(full.scope)
    print(
        f"\nbase's MLPs and experts, which are not among its arguments: {kept / GB:.3f} GB per "
        f"chip; together {kept / GB + step['peak']:.3f} GB"
    )


if __name__ == "__main__":
    main()
