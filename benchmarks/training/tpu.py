"""A DPO step as the TPU compiler sees it: memory a chip and collectives, without a TPU.

    JAX_PLATFORMS=cpu python -m benchmarks.training.tpu --topology v5e:4x4    # needs sdjax[tpu]

Mistral-7B in bfloat16, LoRA of rank 256 on all projections with its optimiser in float32, 16 pairs
of 1,024 tokens, rematerialize; weights and factors are split as their specifications say, and the
pairs over `fsdp`.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp

from benchmarks.planning.topology import ResourceUsage, tpu_devices
from sdjax.models.config import ModelConfig
from sdjax.models.lora import ALL_PROJECTIONS
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tree import unflatten
from sdjax.sharding.mesh import make_mesh
from sdjax.sharding.rules import sharding_of
from sdjax.training.config import OptimizerConfig
from sdjax.training.dpo import DPOConfig, dpo_loss
from sdjax.training.fit import compile_step, rematerialize
from sdjax.training.trainable import assemble_adapter

PAIRS, TOKENS, RANK = 16, 1024, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--tensor", type=int, default=4, help="size of the mesh's tensor axis")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    mesh = make_mesh({"fsdp": -1, "tensor": options.tensor}, devices=tpu_devices(options.topology))
    config = ModelConfig(
        family="mistral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=options.layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=8192,
        norm_eps=1e-5,
    )

    def abstract_params(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(shape, axes, mesh))

    specs = param_specs(config)
    params = unflatten(
        {path: abstract_params(spec.shape, spec.axes, jnp.bfloat16) for path, spec in specs.items()}
    )
    factors = {}
    for path, spec in specs.items():
        if kind_of(path) in ALL_PROJECTIONS:
            (outs, ins), (out_axis, in_axis) = spec.shape, spec.axes
            factors[f"{path}/a"] = abstract_params((RANK, ins), ("rank", in_axis), jnp.float32)
            factors[f"{path}/b"] = abstract_params((outs, RANK), (out_axis, "rank"), jnp.float32)
    factors = unflatten(factors)

    def rows(shape, dtype):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    parts = mesh.shape["fsdp"]
    trained = PAIRS * 2 // parts * (TOKENS - 16)  # the most that there could be
    batch = {
        "tokens": rows((PAIRS, 2, TOKENS), jnp.int32),
        "at": rows((parts, trained), jnp.int32),
        "weights": rows((parts, trained), jnp.float32),
        "reference": rows((PAIRS, 2), jnp.float32),
    }
    loss = rematerialize(dpo_loss(config, assemble_adapter(scale=1.0), DPOConfig()))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    optimiser = OptimizerConfig(learning_rate=1e-6, steps=100)
    state = jax.eval_shape(optimiser.build().init, factors)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.ndim else everywhere
        ),
        placed_like(state, factors),
    )
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (factors, state)]
    _, step = compile_step(loss, optimiser, out_shardings=(*shardings, everywhere))
    start = time.perf_counter()
    needs = ResourceUsage.of(step.lower(factors, state, params, batch).compile())
    seconds = time.perf_counter() - start
    print(
        f"{options.topology}, {dict(mesh.shape)}, jax {jax.__version__}; Mistral-7B, "
        f"{options.layers} layers, LoRA rank {RANK}, {PAIRS} pairs of {TOKENS} tokens; "
        f"compiled in {seconds:.0f} s\n"
    )
    print("| GB a chip | |\n|---|---|")
    for name in ("arguments", "outputs", "aliased", "temporary", "peak"):
        print(f"| {name} | {getattr(needs, name) / 1e9:.2f} |")
    print("\n| collective | result | in the program |\n|---|---|---|")
    for (operation, shapes), count in needs.collectives.most_common():
        print(f"| {operation} | {shapes} | {count} |")


def placed_like(state, factors):
    """The optimiser's state with each moment where its factor is."""
    places = jax.tree.leaves(factors)
    leaves, structure = jax.tree.flatten(state)
    moments = [leaf for leaf in leaves if leaf.ndim]
    placed = iter(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place.sharding)
        for leaf, place in zip(moments, places * 2, strict=True)
    )
    return structure.unflatten([next(placed) if leaf.ndim else leaf for leaf in leaves])


if __name__ == "__main__":
    main()
