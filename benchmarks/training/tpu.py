"""Measure memory per chip and collectives of a DPO step compiled for a TPU, without a TPU.

    JAX_PLATFORMS=cpu python -m benchmarks.training.tpu --topology v5e:4x4    # needs sdjax[tpu]

The step trains Mistral-7B in bfloat16 with a rank-256 LoRA on all projections, float32 optimizer
state, 16 pairs of 1,024 tokens, and rematerialization. Weights and factors are sharded by their
specs, and the pairs over `fsdp`.
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
from sdjax.training.config import DPOConfig, OptimizerConfig
from sdjax.training.dpo import dpo_loss
from sdjax.training.fit import compile_step, make_optimizer, rematerialize
from sdjax.training.trainable import AssembleAdapter

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

    def abstract_array(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(shape, axes, mesh))

    specs = param_specs(config)
    params = unflatten(
        {path: abstract_array(spec.shape, spec.axes, jnp.bfloat16) for path, spec in specs.items()}
    )
    factors = {}
    for path, spec in specs.items():
        if kind_of(path) in ALL_PROJECTIONS:
            (outs, ins), (out_axis, in_axis) = spec.shape, spec.axes
            factors[f"{path}/a"] = abstract_array((RANK, ins), ("rank", in_axis), jnp.float32)
            factors[f"{path}/b"] = abstract_array((outs, RANK), (out_axis, "rank"), jnp.float32)
    factors = unflatten(factors)

    def rows(shape, dtype):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    parts = mesh.shape["fsdp"]
    targets = PAIRS * 2 // parts * (TOKENS - 16)  # upper bound
    batch = {
        "tokens": rows((PAIRS, 2, TOKENS), jnp.int32),
        "target_index": rows((parts, targets), jnp.int32),
        "weights": rows((parts, targets), jnp.float32),
        "reference": rows((PAIRS, 2), jnp.float32),
    }
    loss = rematerialize(dpo_loss(config, AssembleAdapter(scale=1.0), DPOConfig(max_steps=100)))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    optimizer = OptimizerConfig(learning_rate=1e-6, max_steps=100)
    opt_state = jax.eval_shape(make_optimizer(optimizer).init, factors)
    opt_state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.ndim else replicated
        ),
        shard_like(opt_state, factors),
    )
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (factors, opt_state)]
    _, step = compile_step(loss, optimizer, out_shardings=(*shardings, replicated))
    start = time.perf_counter()
    usage = ResourceUsage.of(step.lower(factors, opt_state, params, batch).compile())
    seconds = time.perf_counter() - start
    print(
        f"{options.topology}, {dict(mesh.shape)}, jax {jax.__version__}; Mistral-7B, "
        f"{options.layers} layers, LoRA rank {RANK}, {PAIRS} pairs of {TOKENS} tokens; "
        f"compiled in {seconds:.0f} s\n"
    )
    print("| GB per chip | |\n|---|---|")
    for name in ("arguments", "outputs", "aliased", "temporary", "peak"):
        print(f"| {name} | {getattr(usage, name) / 1e9:.2f} |")
    print("\n| collective | result | count |\n|---|---|---|")
    for (operation, shapes), count in usage.collectives.most_common():
        print(f"| {operation} | {shapes} | {count} |")


def shard_like(opt_state, factors):
    """Shard each moment of the optimizer state like its factor."""
    references = jax.tree.leaves(factors)
    leaves, structure = jax.tree.flatten(opt_state)
    moments = [leaf for leaf in leaves if leaf.ndim]
    sharded = iter(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=reference.sharding)
        for leaf, reference in zip(moments, references * 2, strict=True)
    )
    return structure.unflatten([next(sharded) if leaf.ndim else leaf for leaf in leaves])


if __name__ == "__main__":
    main()
