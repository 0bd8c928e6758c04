"""Selection by magnitude without sorting.

XLA sorts a few million float32 a second on a CPU and gathers the tensor to do it on a mesh;
counting how many elements reach a bound runs at the speed of memory and needs one scalar
all-reduce. The bits of a non-negative float, read as an integer, order as the float does, so 31
counts find the exact k-th largest magnitude, one bit each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kth_magnitude(x: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k-th largest |x|, exactly: float32 scalar, with k counted from 1.

    x: float32 of any shape, fewer than 2^31 elements. k: int32 scalar, may be traced; for k <= 0
    the result is infinite (nothing reaches it), for k > x.size it is 0. NaN counts as largest.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)

    def settle_bit(i: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(bits >= higher, dtype=jnp.int32) >= k, higher, bound)

    bound = jax.lax.fori_loop(0, 31, settle_bit, jnp.int32(0))
    magnitude = jax.lax.bitcast_convert_type(bound, jnp.float32)
    return jnp.where(k <= 0, jnp.inf, magnitude)


def largest(x: jax.Array, density: jax.Array | float) -> jax.Array:
    """Boolean mask of the floor(density * size) elements of largest magnitude.

    Elements equal in magnitude to the last of them are kept too, so that the choice does not depend
    on their order; density >= 1 keeps all, a count of zero keeps none.
    """
    count = jnp.floor(jnp.float32(density) * jnp.float32(x.size))
    count = jnp.minimum(count, jnp.float32(2**31 - 128)).astype(jnp.int32)
    return (jnp.abs(x) >= kth_magnitude(x, count)) | (jnp.float32(density) >= 1)
