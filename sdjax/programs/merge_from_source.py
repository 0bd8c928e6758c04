"""`sdjax merge --algorithm`: a program's file, admitted by the sandbox, applied to folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.buffer_pool import Allocate, aligned_empty
from sdjax.io.peft import TensorReader
from sdjax.io.safetensors_writer import is_finite
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import merge
from sdjax.merging.recipe.output_files import PROGRAM, Provenance
from sdjax.merging.recipe.pipeline import MergeResult, write_merged
from sdjax.merging.recipe.plan import MergePlan, plan_algorithm
from sdjax.merging.recipe.source_models import SourceModel, open_source_model, tensor_path
from sdjax.merging.recipe.stream import OnTensor, not_finite
from sdjax.merging.scope import Scope, select_paths
from sdjax.models.params import kind_of
from sdjax.models.tree import flatten, unflatten
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.config import Limits
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature


def merge_program(
    file: Path,
    base: str,
    experts: Mapping[str, str],
    out: Path,
    *,
    scope: Scope = "mlp",
    seed: int = 0,
    on_tensor: OnTensor | None = None,
) -> MergeResult:
    """Merge experts into a base by a program of the algorithm API.

    file: Python source with ``merge_models`` or ``merge_trees``; it is never executed here, only
    what the sandbox has verified. experts: the names in ``task_vectors`` to model folders. scope:
    which tensors are merged; the others are the base's.

    Raises UserError for a program that is not admitted, with the reason, and as ``merge_recipe``.
    """
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a program file") from error
    if not experts:
        raise UserError("--algorithm needs at least one --expert NAME=PATH")
    models = open_models(base, experts, Path.cwd())
    signature = models.signature(scope)
    with Sandbox(signature, workers=1) as sandbox:
        verdict = sandbox.judge(source, name=file.name)
    if not verdict.admitted:
        raise UserError(f"{file}: {verdict.verdict} ({verdict.rule}): {verdict.message}")
    assert verdict.program is not None
    algorithm = to_algorithm(verdict.program, name=file.stem)
    origin = Provenance(method=file.name, file=PROGRAM, text=source)
    return apply(
        algorithm, models, scope, out, origin=origin, key=jax.random.key(seed), on_tensor=on_tensor
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Models:
    """A base and experts by slot."""

    base: SourceModel
    experts: Mapping[str, SourceModel]

    def shapes(self, scope: Scope) -> dict[str, tuple[int, ...]]:
        """Our path to shape, of the base's tensors in scope."""
        tensors = self.base.tensors
        found = {tensor_path(name): tensors.shape(name) for name in tensors.names}
        return {path: found[path] for path in select_paths(found, scope)}

    def signature(self, scope: Scope, limits: Limits | None = None) -> MergeSignature:
        """What a program for these models is judged against."""
        tensors = {path: (kind_of(path), shape) for path, shape in self.shapes(scope).items()}
        return MergeSignature.of(tuple(self.experts), tensors, limits)


def open_models(base: str, experts: Mapping[str, str], beside: Path) -> Models:
    """Raises UserError for a folder that is missing or damaged."""
    return Models(
        base=open_source_model(base, beside),
        experts={slot: open_source_model(name, beside) for slot, name in experts.items()},
    )


def apply(
    algorithm: Algorithm,
    models: Models,
    scope: Scope,
    out: Path,
    *,
    origin: Provenance,
    key: jax.Array,
    on_tensor: OnTensor | None = None,
) -> MergeResult:
    """Write the base with the algorithm's merged task vector added to the tensors in scope."""
    paths = tuple(models.shapes(scope))
    plan = plan_algorithm(algorithm, models.base, models.experts, paths)
    if algorithm.form == "tree":
        plan = _whole(algorithm, plan, models, key)
    return write_merged(plan, out, origin=origin, key=key, on_tensor=on_tensor)


def _whole(algorithm: Algorithm, plan: MergePlan, models: Models, key: jax.Array) -> MergePlan:
    """The plan of an algorithm that sees all tensors at once: they are merged now, in memory, and
    every step takes what is there."""
    merged = [step for step in plan.steps if step.algorithm is not None]

    def tree(model: SourceModel) -> dict:
        return unflatten({step.path: model.tensors.read(step.name) for step in merged})

    done = merge(
        tree(models.base),
        [tree(expert) for expert in models.experts.values()],
        algorithm,
        slots=tuple(models.experts),
        scope="all",
        key=key,
        num_layers=plan.num_layers,
    )
    new = flatten(done.params)
    arrays = {step.name: np.asarray(new[step.path]) for step in merged}
    for step in merged:
        if not is_finite(arrays[step.name]):
            raise not_finite(step, [one.model.tensors.read(one.name) for one in step.everything])
    base = dataclasses.replace(models.base, tensors=_Replaced(models.base.tensors, arrays))
    steps = (
        step
        if step.algorithm is None
        else dataclasses.replace(
            step,
            base=None,
            algorithm=None,
            inputs=(dataclasses.replace(step.everything[0], model=base),),
        )
        for step in plan.steps
    )
    return dataclasses.replace(plan, steps=tuple(steps))


class _Replaced:
    """A model's tensors, some of them replaced by arrays in memory."""

    def __init__(self, tensors: TensorReader, arrays: Mapping[str, np.ndarray]):
        self.folder, self.folders = tensors.folder, tensors.folders
        self._tensors, self._arrays = tensors, arrays

    @property
    def names(self) -> tuple[str, ...]:
        return self._tensors.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(name)

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        return self._arrays[name] if name in self._arrays else self._tensors.read(name, allocate)
