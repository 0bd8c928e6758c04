"""sdjax: language models that invent algorithms to improve language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdjax.merging.api import merge as merge
    from sdjax.merging.engine import Merged as Merged
    from sdjax.merging.engine import Merger as Merger

# What a user of the library calls; found when it is asked for, since JAX takes a second to import.
_HOMES = {
    "merge": "sdjax.merging.api",
    "Merged": "sdjax.merging.engine",
    "Merger": "sdjax.merging.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
