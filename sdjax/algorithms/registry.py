"""The human-designed methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax

from sdjax.algorithms import (
    dare_linear,
    dare_ties,
    linear,
    magmax,
    model_stock,
    self_developing_a,
    slerp,
    task_arithmetic,
    ties,
)
from sdjax.errors import UserError
from sdjax.merging.algorithm import Algorithm, read_signature

_MODULES: dict[str, ModuleType] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "slerp": slerp,
    "model_stock": model_stock,
    "magmax": magmax,
    "self_developing_a": self_developing_a,
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One hyperparameter: its type in words (a number, one for each expert ...) and its default."""

    name: str
    type: str
    default: Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """What ``sdjax methods`` prints about one method."""

    name: str
    title: str
    mathematics: str
    parameters: tuple[Parameter, ...]
    function: Callable[..., jax.Array]


def algorithms() -> dict[str, Callable[..., jax.Array]]:
    """Name to function of the algorithm API."""
    return {name: module.merge_models for name, module in _MODULES.items()}


def methods() -> Mapping[str, Method]:
    """Name to description, in the order of presentation."""
    out = {}
    for name, module in _MODULES.items():
        signature = read_signature(module.merge_models, name, "tensor")
        out[name] = Method(
            name=name,
            title=(module.__doc__ or "").strip().splitlines()[0],
            mathematics=module.MATHEMATICS,
            parameters=tuple(
                Parameter(name=key, type=_WORDS[how], default=signature.defaults[key])
                for key, how in signature.annotations.items()
            ),
            function=module.merge_models,
        )
    return out


_WORDS = {
    "float": "number",
    "per_expert": "number, or one for each expert",
    "bool": "true or false",
    "int": "whole number",
    "str": "text",
}


def algorithm(name: str, **hyperparameters: Any) -> Algorithm:
    """A method with its hyperparameters bound. Raises UserError for an unknown name or value."""
    known = algorithms()
    if name not in known:
        raise UserError(f"no merge method {name!r}; there are: {', '.join(known)}")
    return Algorithm.from_function(known[name], name=name, **hyperparameters)
