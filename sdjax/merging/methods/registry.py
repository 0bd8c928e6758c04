"""The human-designed methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm, read_signature
from sdjax.merging.method import Hyperparameter, Method
from sdjax.merging.methods import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    iso_c,
    karcher,
    linear,
    magmax,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    ramplus_tl,
    sce,
    self_developing_a,
    slerp,
    task_arithmetic,
    ties,
    tsv,
)

# In the order of presentation: averages, arcs, task vectors, then what mergekit does not have.
_MODULES: tuple[ModuleType, ...] = (
    linear,
    slerp,
    nuslerp,
    multislerp,
    karcher,
    passthrough,
    task_arithmetic,
    ties,
    dare_linear,
    dare_ties,
    breadcrumbs,
    breadcrumbs_ties,
    della,
    della_linear,
    model_stock,
    sce,
    arcee_fusion,
    nearswap,
    ram,
    ramplus_tl,
    tsv,
    iso_c,
    magmax,
    self_developing_a,
)


@cache
def methods() -> Mapping[str, Method]:
    """Name to description, in the order of presentation."""
    return MappingProxyType({m.name: m for m in map(_describe, _MODULES)})


def _describe(module: ModuleType) -> Method:
    name = module.__name__.rpartition(".")[2]
    signature = read_signature(module.merge_models, name, "tensor")
    return Method(
        name=name,
        title=(module.__doc__ or "").strip().splitlines()[0],
        formula=module.FORMULA,
        parameters=tuple(
            Hyperparameter(name=key, type=how, default=signature.defaults[key])
            for key, how in signature.annotations.items()
        ),
        function=module.merge_models,
        schema=module.RECIPE,
    )


def algorithm(name: str, **hyperparameters: Any) -> Algorithm:
    """A method with its hyperparameters bound. Raises UserError for an unknown name or value."""
    known = methods()
    if name not in known:
        raise UserError(f"no merge method {name!r}; there are: {', '.join(known)}")
    return known[name].bind(**hyperparameters)
