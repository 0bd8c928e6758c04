"""Registry of the human-designed merge methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from sdjax.core.errors import UserError, did_you_mean
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.method import Hyperparameter, Method
from sdjax.merging.methods import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    consensus,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    doge,
    expo,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    linear,
    lines,
    magmax,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    opcm,
    passthrough,
    pcb,
    ram,
    ramplus_tl,
    regmean,
    sce,
    self_developing_a,
    slerp,
    subspace_boosting,
    svc,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
from sdjax.merging.signature import read_signature

# In order of presentation: averages, arcs, task vectors, then methods that mergekit lacks: on
# singular values, on elements, on data.
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
    iso_cts,
    subspace_boosting,
    svc,
    opcm,
    wudi,
    doge,
    magmax,
    consensus,
    pcb,
    lines,
    expo,
    fisher,
    regmean,
    self_developing_a,
)


@cache
def methods() -> Mapping[str, Method]:
    """Return all methods by name, in order of presentation."""
    return MappingProxyType({m.name: m for m in map(_describe, _MODULES)})


def algorithm(name: str, **hyperparameters: Any) -> Algorithm:
    """Return a method with its hyperparameters bound.

    Raises:
        UserError: no method of this name, or an invalid hyperparameter.
    """
    available = methods()
    if name not in available:
        hint = did_you_mean(name, available, f"available: {', '.join(available)}")
        raise UserError(f"no merge method {name!r}; {hint}")
    return available[name].bind(**hyperparameters)


def _describe(module: ModuleType) -> Method:
    name = module.__name__.rpartition(".")[2]
    signature = read_signature(module.merge_models, name, "tensor")
    summary, _, description = (module.__doc__ or "").strip().partition("\n")
    return Method(
        name=name,
        summary=summary,
        description=description.strip(),
        formula=module.FORMULA,
        hyperparameters=tuple(
            Hyperparameter(name=key, type=type_name, default=signature.defaults[key])
            for key, type_name in signature.types.items()
        ),
        algorithm=Algorithm.from_function(
            module.merge_models, name=name, constraints=module.RECIPE.constraints
        ),
        schema=module.RECIPE,
        caution=getattr(module, "CAUTION", ""),
    )
