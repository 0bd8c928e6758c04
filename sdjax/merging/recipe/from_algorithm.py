"""Disk-to-disk merges by a single algorithm, such as a verified candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.safetensors_writer import MAX_FILE_BYTES, is_finite
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import merge
from sdjax.merging.methods.registry import methods
from sdjax.merging.recipe.compatibility import compare_configs
from sdjax.merging.recipe.expert_statistics import (
    ExpertStatistics,
    find_statistics,
    needs_statistics,
)
from sdjax.merging.recipe.model_card import Provenance
from sdjax.merging.recipe.pipeline import MergeResult, OnTensor, not_finite, write_merged
from sdjax.merging.recipe.plan import MergePlan, is_floating, plan_algorithm
from sdjax.merging.recipe.source_models import SourceModel, open_source_model
from sdjax.merging.scope import Scope, select_paths
from sdjax.models.tensor_names import kind_of, parse_name


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeModels:
    """Base model and the expert in each slot."""

    base: SourceModel
    experts: Mapping[str, SourceModel]

    def tensors(self, scope: Scope) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the kind and the shape of the base's floating-point tensors in scope, by path."""
        shapes = {
            parse_name(name).path: info.shape
            for name, info in self.base.info.items()
            if is_floating(info)
        }
        return {path: (kind_of(path), shapes[path]) for path in select_paths(shapes, scope)}


def open_models(base: str, experts: Mapping[str, str], relative_to: Path) -> MergeModels:
    """Open a base and experts.

    Args:
        base: name of the base model.
        experts: slot to name of the expert.
        relative_to: folder that paths are relative to, before the working directory.

    Raises:
        UserError: a missing or damaged folder.
    """
    return MergeModels(
        base=open_source_model(base, relative_to),
        experts={slot: open_source_model(name, relative_to) for slot, name in experts.items()},
    )


def merge_algorithm(
    algorithm: Algorithm,
    models: MergeModels,
    scope: Scope,
    out: Path,
    *,
    provenance: Provenance,
    key: jax.Array,
    allow_crimes: bool = False,
    stats: Mapping[str, str] | None = None,
    merged: Mapping[str, np.ndarray] | None = None,
    on_tensor: OnTensor | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> MergeResult:
    """Write the base with the algorithm's merged task vector added to the tensors in scope.

    Args:
        algorithm: an algorithm in either form.
        models: the base and the experts.
        scope: the tensors to merge; all others are copied from the base.
        out: folder of the result.
        provenance: recorded in the model card.
        key: typed PRNG key.
        allow_crimes: merge models of different architectures.
        stats: slot to folder of the expert's statistics; MODEL.stats by default.
        merged: the merged tensors by path, if they have been computed already.
        on_tensor: called with (tensors done, total) at the beginning and after each tensor.
        max_file_bytes: maximum size of a safetensors file.
        overwrite: replace `out` if it exists.

    Raises:
        UserError: as in `merge_recipe`.
    """
    experts = tuple(models.experts.values())
    plan = plan_algorithm(
        algorithm,
        models.base,
        models.experts,
        tuple(models.tensors(scope)),
        key,
        scope=scope if isinstance(scope, str) else ", ".join(scope),
        statistics=_open_statistics(algorithm, models, stats or {}),
        notes=(
            *_cautions(algorithm),
            *compare_configs(models.base, experts, allow_crimes=allow_crimes),
        ),
    )
    if merged is not None:
        plan = _with_arrays(
            plan,
            {step.name: merged[step.path] for step in plan.steps if step.algorithm is not None},
        )
    elif algorithm.form == "tree":
        plan = _merge_in_memory(algorithm, plan, key)
    return write_merged(
        plan,
        out,
        provenance=provenance,
        on_tensor=on_tensor,
        max_file_bytes=max_file_bytes,
        overwrite=overwrite,
    )


def _cautions(algorithm: Algorithm) -> tuple[str, ...]:
    """Return what was published against a shipped method, as notes."""
    method = methods().get(algorithm.name)
    if method is None or method.algorithm.function is not algorithm.function:
        return ()
    return (f"{method.name}: {method.caution}",) if method.caution else ()


def _open_statistics(
    algorithm: Algorithm, models: MergeModels, named: Mapping[str, str]
) -> ExpertStatistics | None:
    """Return the statistics of the experts, if an algorithm needs them."""
    if unknown := sorted(named.keys() - models.experts.keys()):
        raise UserError(f"--stats {unknown[0]}: no expert of this name")
    if not needs_statistics(algorithm):
        if named:
            raise UserError(f"--stats: {algorithm.name} needs no statistics; remove it")
        return None
    folders = [
        find_statistics(expert.name, named.get(slot), Path.cwd())
        for slot, expert in models.experts.items()
    ]
    return ExpertStatistics(algorithm, folders, list(models.experts))


def _merge_in_memory(algorithm: Algorithm, plan: MergePlan, key: jax.Array) -> MergePlan:
    """Run an algorithm in the tree form; return a plan that writes its result."""
    merged = [step for step in plan.steps if step.algorithm is not None]
    if not merged:
        return plan
    by_source = zip(*(step.sources for step in merged), strict=True)  # the base, then each expert
    base, *experts = (
        {step.name: ref.model.reader.read(ref.name) for step, ref in zip(merged, refs, strict=True)}
        for refs in by_source
    )
    result = merge(base, experts, algorithm, slots=plan.slots, key=key)
    arrays = {name: np.asarray(array) for name, array in result.params.items()}
    for step in merged:
        if not is_finite(arrays[step.name]):
            raise not_finite(step, [ref.model.reader.read(ref.name) for ref in step.sources])
    return _with_arrays(plan, arrays)


def _with_arrays(plan: MergePlan, arrays: Mapping[str, np.ndarray]) -> MergePlan:
    """Return a plan that writes arrays in the place of what its algorithms would give."""
    steps = (
        dataclasses.replace(
            step,
            sources=(),
            has_base=False,
            algorithm=None,
            program=None,
            array=arrays[step.name],
        )
        if step.algorithm is not None
        else step
        for step in plan.steps
    )
    return dataclasses.replace(plan, steps=tuple(steps))
