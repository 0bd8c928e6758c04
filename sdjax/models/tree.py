"""Nested dicts of arrays and their flat form, keyed by paths such as `layers/3/mlp/down_proj`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path to leaf, sorted by path; every inner node is a mapping with string keys."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, Mapping):
                yield from walk(value, f"{path}/")
            else:
                yield path, value

    return dict(sorted(walk(tree, "")))


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `leaves`: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree
