"""Trimming by magnitude, shared by TIES and Breadcrumbs."""

from __future__ import annotations

import jax

from sdjax.algorithms.mixing import keep_and_rescale
from sdjax.merging.algorithm import PerExpert
from sdjax.merging.magnitude import below_largest, largest

Vectors = dict[str, jax.Array]


def trim(vectors: Vectors, density: PerExpert, rescale: str) -> Vectors:
    """Keep the share ``density`` of largest magnitude of each tensor."""
    return {
        name: keep_and_rescale(vector, largest(vector, density[name]), density[name], rescale)
        for name, vector in vectors.items()
    }


def trim_both_ends(vectors: Vectors, density: PerExpert, gamma: PerExpert, rescale: str) -> Vectors:
    """Drop the share ``gamma`` of largest magnitude, and keep the share ``density`` below it."""
    return {
        name: keep_and_rescale(
            vector, below_largest(vector, density[name], gamma[name]), density[name], rescale
        )
        for name, vector in vectors.items()
    }
