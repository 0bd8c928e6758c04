"""Trimming by magnitude, shared by TIES and Breadcrumbs."""

from __future__ import annotations

import jax

from sdjax.algorithms.mixing import keep_and_rescale
from sdjax.merging.algorithm import PerExpert
from sdjax.merging.magnitude import below_largest, largest

Vectors = dict[str, jax.Array]


def trim(vectors: Vectors, density: PerExpert, rescale: str) -> Vectors:
    """Keep the share ``density`` of largest magnitude of each tensor."""
    masks = largest(list(vectors.values()), [density[name] for name in vectors])
    return _kept(vectors, masks, density, rescale)


def trim_both_ends(vectors: Vectors, density: PerExpert, gamma: PerExpert, rescale: str) -> Vectors:
    """Drop the share ``gamma`` of largest magnitude, and keep the share ``density`` below it."""
    shares = ([share[name] for name in vectors] for share in (density, gamma))
    return _kept(vectors, below_largest(list(vectors.values()), *shares), density, rescale)


def _kept(vectors: Vectors, masks: list[jax.Array], density: PerExpert, rescale: str) -> Vectors:
    return {
        name: keep_and_rescale(vector, mask, density[name], rescale)
        for (name, vector), mask in zip(vectors.items(), masks, strict=True)
    }
