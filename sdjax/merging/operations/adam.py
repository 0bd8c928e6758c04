"""Adam, for methods that minimize an objective of the merged task vector.

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import Tensor

_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.999, 1e-8  # the paper's values, and PyTorch's


def adam(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    learning_rate: jax.Array | float,
) -> Tensor:
    """Minimize an objective by Adam (Kingma & Ba 2015, arXiv 1412.6980).

    Args:
        gradient: function of a tensor to the objective's gradient.
        start: the first iterate.
        steps: number of steps.
        learning_rate: step size.
    """

    def step(index: jax.Array, carry: tuple[Tensor, Tensor, Tensor]) -> tuple:
        value, mean, square = carry
        slope = gradient(value)
        mean = _DECAY * mean + (1 - _DECAY) * slope
        square = _SQUARE_DECAY * square + (1 - _SQUARE_DECAY) * slope * slope
        count = (index + 1).astype(jnp.float32)
        unbiased = square / (1 - _SQUARE_DECAY**count)
        # Not jnp.sqrt of zero, whose derivative is infinite.
        root = jnp.where(unbiased > 0, jnp.sqrt(jnp.where(unbiased > 0, unbiased, 1.0)), 0.0)
        moved = learning_rate * mean / (1 - _DECAY**count) / (root + _EPSILON)
        return value - moved, mean, square

    zeros = jnp.zeros_like(start)
    # A fixed number of steps, since a while loop cannot be differentiated in reverse.
    value, _, _ = jax.lax.fori_loop(0, steps, step, (start, zeros, zeros))
    return value
