"""Measure bytes, memory and collectives of merge methods compiled for a TPU, without a TPU.

    JAX_PLATFORMS=cpu python -m benchmarks.merge.tpu --topology v5e:2x4     # needs sdjax[tpu]

Every method is compiled for each matrix of a layer of Mistral-7B in bfloat16, sharded over the
chips by `sdjax.sharding.rules`. The minimum is one read of base and experts and one write of the
result; methods that need a norm or a count must read more than once. The methods of `SPECTRAL` are
omitted because compiling a singular value decomposition takes more than 24 GiB of memory.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import jax
import jax.numpy as jnp

from benchmarks.planning.topology import ResourceUsage, tpu_devices
from sdjax.merging.method import Method
from sdjax.merging.methods.registry import methods
from sdjax.merging.tensor_program import TensorProgram
from sdjax.sharding.mesh import make_mesh
from sdjax.sharding.rules import sharding_of

SPECTRAL = ("tsv", "iso_c", "iso_cts", "subspace_boosting", "svc", "opcm", "doge")
HIDDEN, INNER, KEY_VALUE = 4096, 14336, 1024
# Shape, logical axes, and number of such matrices per layer.
MATRICES = {
    "q_proj, o_proj": ((HIDDEN, HIDDEN), ("heads", "embed"), 2),
    "k_proj, v_proj": ((KEY_VALUE, HIDDEN), ("kv_heads", "embed"), 2),
    "gate_proj, up_proj": ((INNER, HIDDEN), ("mlp", "embed"), 2),
    "down_proj": ((HIDDEN, INNER), ("embed", "mlp"), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--tensor", type=int, default=4, help="size of the mesh's tensor axis")
    parser.add_argument("--experts", type=int, default=3)
    names = [name for name in methods() if name not in SPECTRAL]
    parser.add_argument("--methods", default=",".join(names))
    options = parser.parse_args()
    devices = tpu_devices(options.topology)
    mesh = make_mesh({"fsdp": -1, "tensor": options.tensor}, devices=devices)
    print(f"{options.topology}, {dict(mesh.shape)}, jax {jax.__version__}; a layer of Mistral-7B,")
    print(f"bfloat16, {options.experts} experts (or fewer, if the method takes fewer)\n")
    print(
        "| method | bytes accessed / minimum | temporary MiB per chip | collectives | compile s |"
    )
    print("|---|---|---|---|---|")
    for name in options.methods.split(","):
        print(row(methods()[name], mesh, options.experts), flush=True)


def row(method: Method, mesh: jax.sharding.Mesh, experts: int) -> str:
    minimum = accessed = 0.0
    temporary, collectives = 0, Counter()
    start = time.perf_counter()
    for shape, axes, count in MATRICES.values():
        leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding_of(shape, axes, mesh))
        slots = tuple(
            f"expert_{j}" for j in range(min(experts, method.schema.max_models or experts))
        )
        base = leaf if method.schema.base in ("required", "optional") else None
        program = TensorProgram.of(
            method.bind(),
            slots,
            base,
            (leaf,) * len(slots),
            path="",
            key=jax.random.key(0),
        )
        needs = ResourceUsage.of(program.lower().compile())
        minimum += count * (needs.arguments + needs.outputs)
        accessed += count * needs.accessed
        temporary = max(temporary, needs.temporary)
        collectives += needs.collectives
    counts = Counter()
    for (operation, shapes), number in collectives.items():
        counts[f"{operation} {shapes}"] += number
    listed = (
        ", ".join(f"{number} {operation}" for operation, number in counts.most_common(3)) or "none"
    )
    return (
        f"| {method.name} | {accessed / minimum:.2f} | {temporary / 2**20:.1f} | {listed} "
        f"| {time.perf_counter() - start:.1f} |"
    )


if __name__ == "__main__":
    main()
