"""The merges of ablations: a program with one change, of itself or of its input.

Changes of the input (an expert is left out, two are swapped) and of the result (it is scaled) leave
the program as it is, so that they share its executables. All changes of constants share those of
its parametric form (`sdjax.programs.parametric`). Another scope is another signature, against which
the sandbox judges the program again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.recent import Recent
from sdjax.io.hf_checkpoint import load_model
from sdjax.merging.engine import Merger
from sdjax.merging.merged_model import MergedModel
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.scope import select_paths
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.programs.signature import model_signature
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import apply_program, trial_of
from sdjax.search.bases import context_on_base, experts_on_base
from sdjax.search.context import RunContext
from sdjax.search.multihost import SharedJudge, open_sandbox, try_merge
from sdjax.search.phases import judged_program
from sdjax.search.store import Store
from sdjax.search.types import MAIN, Entry, Program
from sdjax.sharding.memory import MemoryLimitExceeded
from sdjax.tuning.programs import program_tunable
from sdjax.tuning.types import Parameter, Tunable

_CANNOT_MERGE = (
    MemoryLimitExceeded,
    UserError,
    NotImplementedError,
    jax.errors.JaxRuntimeError,
)

logger = logging.getLogger(__name__)


class MergeFailure(Exception):
    """A merge that is refused or fails, with the reason."""


class AblationMerges:
    """Merges with changed programs or inputs; a context manager.

    What several ablations of a program need is kept while the program stays the same, and models
    of another scope until the end.
    """

    def __init__(self, context: RunContext, store: Store, sandbox: Sandbox | None) -> None:
        """Prepare the merges.

        Args:
            context: the loaded run.
            store: the run's store.
            sandbox: the sandbox on the main process; None on the others.
        """
        self._root = context
        self._store = store
        self._sandbox = sandbox
        self._judge = SharedJudge(sandbox, context.signature)
        self._scopes: dict[tuple[str, str | None], tuple[RunContext, Sandbox | None]] = {}
        self._tunables: dict[str, Tunable] = {}
        self._merged: dict[str, MergedModel] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> AblationMerges:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def parameters(self, program: Entry) -> Sequence[Parameter]:
        """Return the constants of a program that can be tuned; none if it has none."""
        try:
            return self._tunable(self._program(program.name)).parameters
        except UserError as error:
            logger.info("no ablation of constants: %s", error)
            return ()

    def merge(self, ablation: Entry) -> MergedModel:
        """Merge the experts of the search with an ablation.

        Raises:
            MergeFailure: the merge is refused or fails.
        """
        detail = ablation.detail
        program = self._program(str(detail["program"]))
        if "scale" not in detail:
            self._merged.clear()  # its memory
        context = self._context(program)
        try:
            if "scale" in detail:
                return self._scaled(context, program, float(detail["scale"]))
            if "constant" in detail:
                name, value = str(detail["constant"]), float(detail["value"])
                return self._with_constant(context, program, name, value)
            if "expert" in detail:
                experts = {str(detail["expert"]): context.seed}
                return self._apply(_with_experts(context, experts), program)
            if "swapped" in detail:
                first, second = map(str, detail["swapped"])
                trees = _experts(context)
                experts = {first: trees[second], second: trees[first]}
                return self._apply(_with_experts(context, experts), program)
            return self._in_scope(context, program, str(detail["scope"]))
        except _CANNOT_MERGE as error:
            text = error if isinstance(error, UserError) else type(error).__name__
            raise MergeFailure(" ".join(str(text).split())) from error

    def _program(self, name: str) -> Program:
        (entry,) = self._store.select(Entry, name=name)
        return self._store.program(entry.identity or "")

    def _context(self, program: Program) -> RunContext:
        """Return the context with the base of a program."""
        return context_on_base(self._root, self._store, program.base, sandbox=self._sandbox)

    def _apply(self, context: RunContext, program: Program) -> MergedModel:
        application, merged = apply_program(context, program, MAIN)
        if merged is None:
            raise MergeFailure(application.message or application.verdict)
        return merged

    def _scaled(self, context: RunContext, program: Program, scale: float) -> MergedModel:
        """Return the base plus the scaled task vector of the merged model, which is an expert."""
        if program.identity not in self._merged:
            self._merged = {program.identity: self._apply(context, program)}
        merged = self._merged[program.identity].params
        merger = _merger(context, [merged], context.paths)
        method = algorithm("task_arithmetic").bind(weight=scale)
        return merger(method, key=context.key("merge"))

    def _with_constant(
        self, context: RunContext, program: Program, name: str, value: float
    ) -> MergedModel:
        tunable = self._tunable(program)
        values = np.array([value if one.name == name else one.start for one in tunable.parameters])
        return context.merge(tunable.bind(values))

    def _tunable(self, program: Program) -> Tunable:
        if program.identity not in self._tunables:
            on_cpu = jax.default_backend() == "cpu"
            trial = trial_of(self._context(program), MAIN) if on_cpu else None
            tunable = program_tunable(
                program.source,
                self._judge,
                name=f"program {program.identity[:8]}",
                trial=trial,
                with_gradient=False,
            )
            self._tunables = {program.identity: tunable}
        return self._tunables[program.identity]

    def _in_scope(self, on_base: RunContext, program: Program, scope: str) -> MergedModel:
        key = scope, program.base
        if key not in self._scopes:
            # Only one base is in memory.
            self._scopes = {one: v for one, v in self._scopes.items() if one[1] == program.base}
            context = _scoped(on_base, self._root, scope)
            self._scopes[key] = context, self._stack.enter_context(open_sandbox(context))
        context, sandbox = self._scopes[key]
        judge = SharedJudge(sandbox, context.signature)
        verdict = judge.judge(program.source, name=scope)
        judged = judged_program(context, program.source, verdict)
        if judged is None:
            raise MergeFailure(f"{verdict.verdict} ({verdict.rule}): {verdict.message}")
        if jax.default_backend() == "cpu":
            refusal = try_merge(sandbox, judged.ir, trial_of(context, MAIN))
            if refusal is not None:
                raise MergeFailure(f"{refusal.verdict} ({refusal.rule}): {refusal.message}")
        return self._apply(context, judged)


def _experts(context: RunContext) -> dict[str, Any]:
    return dict(zip(context.config.slots, context.experts[MAIN], strict=True))


def _with_experts(context: RunContext, changed: Mapping[str, Any]) -> RunContext:
    """Return the context with other experts in some slots."""
    trees = {**_experts(context), **changed}
    merger = _merger(context, list(trees.values()), context.paths)
    return dataclasses.replace(context, mergers={**context.mergers, MAIN: merger})


def _scoped(context: RunContext, root: RunContext, scope: str) -> RunContext:
    """Return the context of the search with other tensors in scope, which are loaded.

    Args:
        context: the context with the base of a program.
        root: the context with the seed.
        scope: the other scope.
    """
    config = context.config
    paths = select_paths(param_specs(context.model), scope)
    experts = [
        load_model(config.experts[slot].model, paths=paths, mesh=context.mesh)[1]
        if not set(paths) <= set(flatten(tree))
        else tree
        for slot, tree in zip(config.slots, root.experts[MAIN], strict=True)
    ]
    if context.base is not None:
        experts = list(experts_on_base(config, experts, seed=root.seed, base=context.seed))
    return dataclasses.replace(
        context,
        paths=paths,
        signature=model_signature(context.model, config.slots, scope, config.sandbox),
        experts={MAIN: experts},
        mergers={MAIN: _merger(context, experts, paths)},
        verified=Recent(context.verified.capacity),
    )


def _merger(context: RunContext, experts: Sequence[Any], paths: Sequence[str]) -> Merger:
    slots = context.config.slots if len(experts) == len(context.config.slots) else None
    return Merger(
        context.seed,
        experts,
        slots=slots,
        scope=tuple(paths),
        num_layers=context.model.num_layers,
        compile_cache=context.mergers[MAIN].compile_cache,
    )
