"""Weights of the bases of co-evolution, computed from the run's programs.

A base is not kept as a file, which would take as much storage as the seed per base: it is merged
again from the seed, the experts and the stored programs of its chain. Merging is deterministic, so
the weights are the same bit for bit; the fingerprint that was stored when the base was chosen is
compared with theirs. Only one base is in memory at a time, next to the seed, whose tensors outside
the scope it shares.

The task vectors on a base are taken from it (`task_vectors: recomputed`), or they are those of the
seed (`kept`), in which case the experts in scope are held in float32.

Axes: *shape (of a tensor).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.merging.engine import Merger
from sdjax.models.fingerprint import fingerprint
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.sandbox.refusal import NON_FINITE, Refusal
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import apply_program, trial_of
from sdjax.search.base_chains import base_of_entry
from sdjax.search.config import RunConfig
from sdjax.search.context import BaseWeights, ScoringContext
from sdjax.search.controls import method_algorithm
from sdjax.search.entry_names import display_name
from sdjax.search.multihost import try_merge
from sdjax.search.score_types import Application, Promotion
from sdjax.search.store import Store
from sdjax.search.types import MAIN, Entry

Context = TypeVar("Context", bound=ScoringContext)

logger = logging.getLogger(__name__)


def context_on_base(
    context: Context,
    store: Store,
    base: str | None,
    setting: str = MAIN,
    *,
    sandbox: Sandbox | None = None,
) -> Context:
    """Return the context with another base in the place of the seed, in one setting.

    Args:
        context: the loaded run, or its context on any base.
        store: the run's store.
        base: entry of the base; None for the seed.
        setting: name of the setting whose models are merged.
        sandbox: the sandbox on the main process, which tries the programs of the base that have
            not been applied in this setting; None on the others.

    Raises:
        Refusal: the models of the setting cannot be merged into this base.
    """
    if base == context.base and setting in context.mergers:
        return context
    root = context if context.root is None else context.root
    assert isinstance(root, type(context))
    if base is None:
        return root
    weights = _weights(root, store, base, setting, sandbox)
    return dataclasses.replace(
        root,
        base=base,
        root=root,
        seed=weights.params,
        experts={setting: weights.experts},
        mergers={setting: weights.merger},
    )


def experts_on_base(
    config: RunConfig, experts: Sequence[Params], *, seed: Params, base: Params
) -> Sequence[Params]:
    """Return the experts whose differences from a base are the task vectors on it.

    Args:
        config: config of the run.
        experts: the experts, or their tensors in a scope.
        seed: parameters of the seed.
        base: parameters of the base.
    """
    coevolution = config.coevolution
    if coevolution is None or coevolution.task_vectors == "recomputed":
        return experts
    seeds, bases = flatten(seed), flatten(base)
    return [
        unflatten(
            {
                path: _shifted(expert.sharding)(expert, seeds[path], bases[path])
                if jnp.issubdtype(expert.dtype, jnp.floating)
                else expert
                for path, expert in flatten(tree).items()
            }
        )
        for tree in experts
    ]


def _weights(
    root: ScoringContext, store: Store, base: str, setting: str, sandbox: Sandbox | None
) -> BaseWeights:
    """Return the weights of a base, which replace those of the last one in memory."""
    last = root.last_base.get("weights")
    if last is not None and last.is_of(store, base, setting):
        return last
    (entry,) = store.select(Entry, name=base)
    parent = context_on_base(root, store, base_of_entry(store, entry), setting, sandbox=sandbox)
    params = _merged(parent, store, entry, setting, sandbox)
    root.last_base.clear()  # its memory
    if setting == MAIN:
        _check_fingerprint(store, base, params)
    experts = experts_on_base(root.config, root.experts[setting], seed=root.seed, base=params)
    merger = Merger(
        params,
        experts,
        slots=root.config.slots,
        scope=root.paths,
        num_layers=root.model.num_layers,
        compile_cache=root.mergers[setting].compile_cache,
    )
    weights = BaseWeights(
        store=store, base=base, setting=setting, params=params, experts=experts, merger=merger
    )
    root.last_base["weights"] = weights
    return weights


def _merged(
    context: ScoringContext, store: Store, entry: Entry, setting: str, sandbox: Sandbox | None
) -> Params:
    """Return the merged model of an entry."""
    title = f"the base {display_name(entry.name)}"
    if entry.kind != "program":
        merged = context.merge(method_algorithm(context, entry.detail), setting)
        if not merged.finite:
            raise Refusal(NON_FINITE, "base", f"{title} is not finite")
        return merged.params
    program = store.program(entry.identity or "")
    tried = store.select(Application, entry=entry.name, setting=setting)
    if tried and not tried[0].admitted:
        raise Refusal(tried[0].verdict, "base", f"{title}: {tried[0].message}")
    if not tried and jax.default_backend() == "cpu":
        refusal = try_merge(sandbox, program.ir, trial_of(context, setting))
        if refusal is not None:
            raise Refusal(refusal.verdict, "base", f"{title}: {refusal.message}")
    application, model = apply_program(context, program, setting)
    if not tried:
        store.save(application)
    if model is None:
        raise Refusal(application.verdict, "base", f"{title}: {application.message}")
    return model.params


def _check_fingerprint(store: Store, base: str, params: Params) -> None:
    stored = {one.fingerprint for one in store.select(Promotion, entry=base)} - {None}
    if stored and fingerprint(params) not in stored:
        logger.warning(
            "the weights of the base %s are not those that the run chose: versions or devices "
            "differ, and rounding with them",
            display_name(base),
        )


@functools.cache
def _shifted(sharding: Any) -> Callable[..., jax.Array]:
    return jax.jit(_add_task_vector, out_shardings=sharding)


def _add_task_vector(
    expert: Float[Array, "*shape"], seed: Float[Array, "*shape"], base: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    expert, seed, base = (x.astype(jnp.float32) for x in (expert, seed, base))
    # A tensor that the expert has not changed has the base's bits, so that it is skipped.
    return base + (expert - seed)
