"""Write random bfloat16 Llama checkpoints for merging: a base and three variants.

    python benchmarks/merge/make_checkpoints.py --size 135m --out /tmp/merge

The shapes match SmolLM2-135M and TinyLlama-1.1B. Each variant is the base plus Gaussian noise with
a tenth of its magnitude. The 1b size is written in shards of at most 1 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.io.hf_checkpoint import write_model
from sdjax.models.config import ModelConfig
from sdjax.models.params import init_params
from sdjax.models.tree import flatten, unflatten

VARIANTS = ("first", "second", "third")


def llama(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        family="llama",
        max_seq_len=2048,
        norm_eps=1e-5,
        eos_token_ids=(2,),
        **sizes,
    )


SIZES = {
    "tiny": llama(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        tie_embeddings=True,
    ),
    "135m": llama(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_embeddings=True,
    ),
    "1b": llama(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=False,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = SIZES[options.size]
    base = init_params(config, jax.random.key(0), jnp.bfloat16)
    folder = options.out / options.size
    write_model(folder / "base", config, base, max_file_bytes=10**9)
    for number, name in enumerate(VARIANTS, start=1):
        write_model(folder / name, config, variant(base, number), max_file_bytes=10**9)
    print(folder)


def variant(base: dict, number: int) -> dict:
    """Return the base plus noise with a tenth of each tensor's root mean square."""
    key = jax.random.key(number)
    leaves = {}
    for index, (path, leaf) in enumerate(flatten(base).items()):
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
        weights = leaf.astype(jnp.float32)
        leaves[path] = (weights + 0.1 * jnp.sqrt(jnp.mean(weights**2)) * noise).astype(leaf.dtype)
    return unflatten(leaves)


if __name__ == "__main__":
    main()
