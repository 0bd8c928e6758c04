"""Building blocks of several methods: weighted sums, sign election, rescaling, changed elements.

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.xla.reductions import sums

Weights = Mapping[str, Float32[Array, ""]]
Masks = Mapping[str, Bool[Array, "*shape"]]

RESCALE = ("density", "l1", "none")
ELECT = ("weighted", "plain")
# Value in a recipe -> value of the hyperparameter.
RESCALE_CHOICES: dict[Any, str] = {True: "l1", False: "none", **{name: name for name in RESCALE}}
ELECT_CHOICES = {name: name for name in ELECT}


def weighted_sum(vectors: TaskVectors, weight: Weights, normalize: bool) -> Tensor:
    """Return sum_k w_k v_k; with `normalize`, divided by sum_k w_k (or by 1 if that is zero)."""
    total = sum(weight[name] * vector for name, vector in vectors.items())
    if normalize:
        divisor = jnp.asarray(sum(weight[name] for name in vectors))
        total = total / jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)
    return jnp.asarray(total)


def sign_agreement(votes: TaskVectors) -> dict[str, jax.Array]:
    """Return masks of the elements whose sign is that of the sum (a sum of zero counts as plus)."""
    elected = jnp.where(sum(votes.values()) >= 0, 1.0, -1.0)
    return {name: jnp.sign(vote) == elected for name, vote in votes.items()}


def elected_sum(
    vectors: TaskVectors, weight: Weights, normalize: bool, elect: str = "weighted"
) -> Tensor:
    """Return, per element, the weighted sum over the experts that have the elected sign.

    Args:
        vectors: the task vectors.
        weight: weight of each expert.
        normalize: divide, per element, by the sum of the participating weights.
        elect: the elected sign is that of sum_k w_k v_k ("weighted") or of sum_k v_k ("plain").
    """
    if elect not in ELECT:
        raise ValueError(f"elect must be one of {', '.join(ELECT)}, not {elect!r}")
    # A negative weight flips an expert's sign, in both the weighted election and the sum.
    terms = {name: weight[name] * vector for name, vector in vectors.items()}
    agrees = sign_agreement(terms if elect == "weighted" else vectors)
    total = sum(jnp.where(agrees[name], terms[name], 0.0) for name in vectors)
    if normalize:
        divisor = sum(jnp.where(agrees[name], weight[name], 0.0) for name in vectors)
        total = total / jnp.where(divisor == 0, 1.0, divisor)
    return jnp.asarray(total)


def keep_and_rescale(
    vectors: TaskVectors, masks: Masks, kept: Mapping[str, jax.Array], rescale: str
) -> TaskVectors:
    """Return each vector where its mask is true, rescaled, and zero elsewhere.

    Args:
        vectors: the task vectors.
        masks: the elements to keep.
        kept: probability or fraction with which an element is kept: a scalar, or one per element.
        rescale: "density" divides by `kept`, which preserves the expectation; "l1" restores the sum
            of magnitudes (as in mergekit); "none" does nothing.
    """
    if rescale not in RESCALE:
        raise ValueError(f"rescale must be one of {', '.join(RESCALE)}, not {rescale!r}")
    sparse = {name: jnp.where(masks[name], vector, 0.0) for name, vector in vectors.items()}
    if rescale == "density":
        return {n: v / jnp.where(kept[n] > 0, kept[n], 1.0) for n, v in sparse.items()}
    if rescale == "l1":
        return {n: v * _l1_ratio(vectors[n], masks[n]) for n, v in sparse.items()}
    return sparse


def changed_elements(
    vectors: TaskVectors, epsilon: Float32[Array, ""] | float
) -> tuple[TaskVectors, Masks, Tensor]:
    """Return the changes larger than `epsilon`, their masks and the expert counts.

    Returns:
        Task vectors that are zero elsewhere; their masks; the number of experts that changed each
        element, as float32.
    """
    masks = {name: jnp.abs(v) > epsilon for name, v in vectors.items()}
    changes = {name: jnp.where(masks[name], v, 0.0) for name, v in vectors.items()}
    return changes, masks, jnp.asarray(sum(mask.astype(jnp.float32) for mask in masks.values()))


def _l1_ratio(vector: Tensor, mask: Bool[Array, "*shape"]) -> Float32[Array, ""]:
    magnitude = jnp.abs(vector)
    before, after = sums([magnitude, jnp.where(mask, magnitude, 0.0)])
    return jnp.where((before < 1e-7) | (after < 1e-7), 1.0, before / after)
