"""Which experts have changed an element, shared by the two RAM methods."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Vectors = dict[str, jax.Array]


def changed_elements(
    vectors: Vectors, epsilon: jax.Array | float
) -> tuple[Vectors, Vectors, jax.Array]:
    """By expert: what it changed by more than ``epsilon`` (zero elsewhere), and where; and how
    many experts changed each element, as float32.
    """
    masks = {name: jnp.abs(v) > epsilon for name, v in vectors.items()}
    kept = {name: jnp.where(masks[name], v, 0.0) for name, v in vectors.items()}
    return kept, masks, jnp.asarray(sum(mask.astype(jnp.float32) for mask in masks.values()))
