"""Flat form of parameter trees, keyed by paths such as `layers/3/mlp/down_proj`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict from path to leaf, sorted by path."""
    from flax import traverse_util  # takes half a second to import

    return dict(sorted(traverse_util.flatten_dict(dict(tree), sep="/").items()))


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts from a dict of path to leaf; the inverse of `flatten`."""
    from flax import traverse_util

    return traverse_util.unflatten_dict(leaves, sep="/")
