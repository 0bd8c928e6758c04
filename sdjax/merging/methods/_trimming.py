"""Trimming by magnitude, shared by TIES and Breadcrumbs."""

from __future__ import annotations

import jax

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.methods._mixing import keep_and_rescale
from sdjax.merging.topk_threshold import magnitude_band_masks, topk_masks

Vectors = dict[str, jax.Array]


def trim(vectors: Vectors, density: PerExpert, rescale: str) -> Vectors:
    """Keep the share ``density`` of largest magnitude of each tensor."""
    masks = topk_masks(list(vectors.values()), [density[name] for name in vectors])
    return keep_and_rescale(vectors, dict(zip(vectors, masks, strict=True)), density, rescale)


def trim_both_ends(vectors: Vectors, density: PerExpert, gamma: PerExpert, rescale: str) -> Vectors:
    """Drop the share ``gamma`` of largest magnitude, and keep the share ``density`` below it."""
    shares = ([share[name] for name in vectors] for share in (density, gamma))
    masks = magnitude_band_masks(list(vectors.values()), *shares)
    return keep_and_rescale(vectors, dict(zip(vectors, masks, strict=True)), density, rescale)
