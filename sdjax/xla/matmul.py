"""Matrix product with few rows, for which XLA's CPU backend picks a slow order.

Axes: rows (tokens), in and out (widths of the projection).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# With at most this many rows, the CPU backend multiplies faster with the weight on the left.
_WEIGHT_FIRST_MAX_ROWS = 128


def matmul_transposed(
    rows: Float[Array, "rows in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "rows out"]:
    """Return `rows @ weight.T`.

    With few rows, as in decoding, XLA's CPU backend multiplies up to three times as fast with the
    weight on the left. The barrier prevents XLA from reversing the product.

    Args:
        rows: activations.
        weight: a projection in Hugging Face's orientation.
        dtype: dtype of the result; that of the operands by default.
    """
    if rows.shape[0] > _WEIGHT_FIRST_MAX_ROWS:
        return jnp.matmul(rows, weight.T, preferred_element_type=dtype)
    product = jnp.matmul(weight, rows.T, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(product).T
