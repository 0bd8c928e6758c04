"""The loaded parts of a run: its plan, and the weights of its models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.random_keys import fold_in_name
from sdjax.core.recent import Recent
from sdjax.io.hf_checkpoint import load_generator, load_model
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger
from sdjax.merging.merged_model import MergedModel
from sdjax.models.lora import Adapter, init_adapter, shard_adapter
from sdjax.models.types import Params
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import VerifiedProgram, verify_ir
from sdjax.search.config import RunConfig
from sdjax.search.plan import RunPlan, ScoringPlan, plan_run
from sdjax.search.store import Store
from sdjax.search.types import MAIN, Program
from sdjax.training.jit_cache import JitCache

_CACHED_PROGRAMS = 1024  # verified programs, of some 30 kB each
_CACHED_MERGES = 1024  # executables; a program has one per shape and kind of tensor


def run_key(rng_seed: int, purpose: str, *numbers: int) -> jax.Array:
    """Return the PRNG key of one purpose, independent of all others.

    Args:
        rng_seed: seed of the run.
        purpose: name of the purpose, such as "merge".
        numbers: numbers to fold in, such as the iteration.
    """
    key = fold_in_name(jax.random.key(rng_seed), purpose)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BaseWeights:
    """The weights of a base that is not the seed; see `sdjax.search.bases`.

    Attributes:
        store: store of the run whose base it is.
        base: name of the base's entry.
        setting: name of the setting whose models were merged into it.
        params: parameters of the base.
        experts: the experts whose differences from the base are the task vectors.
        merger: the merger of the base and the experts.
    """

    store: Store
    base: str
    setting: str
    params: Params
    experts: Sequence[Params]
    merger: Merger

    def is_of(self, store: Store, base: str, setting: str) -> bool:
        """Return whether these are the weights of a base in a setting."""
        return self.store is store and (self.base, self.setting) == (base, setting)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoringContext(ScoringPlan):
    """The loaded models of a run. Only `verified`, `model_gradients` and `last_base` change.

    Attributes:
        seed: parameters of the seed, or of the base that takes its place.
        experts: for each setting, the parameters in scope of each expert, in slot order.
        mergers: for each setting, the merger of the seed and the experts.
        verified: recently used verified programs by identity.
        model_gradients: executables of the models' gradients, shared by all that is tuned.
        base: entry whose merged model takes the place of the seed; None for the seed. See
            `sdjax.search.bases.context_on_base`.
        root: the context with the seed, if this one has another base.
        last_base: cache of the weights of the last base, under the key "weights".
    """

    seed: Params
    experts: Mapping[str, Sequence[Params]]
    mergers: Mapping[str, Merger]
    verified: Recent[str, VerifiedProgram] = dataclasses.field(
        default_factory=lambda: Recent(_CACHED_PROGRAMS)
    )
    model_gradients: CompileCache = dataclasses.field(default_factory=CompileCache)
    base: str | None = None
    root: ScoringContext | None = None
    last_base: dict[str, BaseWeights] = dataclasses.field(default_factory=dict)

    def key(self, purpose: str, *numbers: int) -> jax.Array:
        """Return the PRNG key of one purpose; see `run_key`."""
        return run_key(self.config.rng_seed, purpose, *numbers)

    def verified_program(self, program: Program) -> VerifiedProgram:
        """Return the verified form of a stored program, verifying it on first use.

        Raises:
            UserError: see `verify_stored`.
        """
        if program.identity not in self.verified:
            self.verified[program.identity] = verify_stored(program, self.signature)
        return self.verified[program.identity]

    def merge(
        self, algorithm: Algorithm, setting: str = MAIN, *, max_memory: int | None = None
    ) -> MergedModel:
        """Add the algorithm's merged task vector to the seed's tensors in scope.

        Args:
            algorithm: algorithm to merge with.
            setting: name of the setting whose experts are merged.
            max_memory: maximum memory of a compiled merge in bytes.

        Raises:
            MemoryLimitExceeded: a compiled merge requires more than `max_memory` bytes.
        """
        return self.mergers[setting](algorithm, key=self.key("merge"), max_memory=max_memory)

    def with_expert(self, index: int, setting: str = MAIN) -> Params:
        """Return the seed's parameters with the tensors in scope replaced by an expert's."""

        def merge_models(task_vectors: Mapping[str, jax.Array]) -> jax.Array:
            return list(task_vectors.values())[index]

        algorithm = Algorithm.from_function(merge_models, name=f"expert_{index + 1}")
        return self.merge(algorithm, setting).params


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunContext(ScoringContext, RunPlan):
    """The loaded parts of a run. Only the caches change.

    Attributes:
        generator_models: parameters and adapter of each other local model that writes programs.
        training_jits: jitted functions of training, shared by all iterations.
    """

    generator_models: Mapping[str, tuple[Params, Adapter | None]] = dataclasses.field(
        default_factory=dict
    )
    training_jits: JitCache = dataclasses.field(default_factory=JitCache)

    @cached_property
    def compute_seed(self) -> Params:
        """The seed's parameters in the compute dtype of training."""
        dtype = self.generator_decoder.compute_dtype
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self.seed)

    def new_adapter(self) -> Adapter:
        """Return the initial adapter of the first generator."""
        training = self.config.training
        adapter = self.initial_adapter or init_adapter(
            self.model, self.key("adapter"), rank=training.rank, alpha=training.alpha
        )
        return adapter if self.mesh is None else shard_adapter(adapter, self.model, self.mesh)

    def was_trained_on(self, identity: str) -> bool | None:
        """Return whether the first generator was trained on a program; None if unknown."""
        if self.training_identities is None:
            return None
        return bool(np.isin(np.uint64(int(identity[:16], 16)), self.training_identities))


def verify_stored(program: Program, signature: MergeSignature) -> VerifiedProgram:
    """Return the verified form of a stored program.

    Raises:
        UserError: the program is refused, though it was admitted when it was stored.
    """
    try:
        return verify_ir(program.ir, signature)
    except Refusal as refusal:
        raise UserError(
            f"the stored program {truncated_repr(program.identity[:12])} is not accepted "
            f"({refusal.rule}: {refusal.message}); the run was changed, or another version of "
            "sdjax wrote it: use that version, or start a new run"
        ) from None


def build_context(config: RunConfig) -> RunContext:
    """Plan a run and load its weights; see `plan_run` and `load_context`."""
    return load_context(plan_run(config))


def load_context(plan: RunPlan) -> RunContext:
    """Load the weights of a planned run.

    Raises:
        UserError: weights that cannot be read or contain NaN.
    """
    models = {
        name: load_generator(plan.config.generators[name].model or "", mesh=plan.mesh)[1:]
        for name in plan.generators.local
    }
    return RunContext(**vars(plan), **_load_models(plan), generator_models=models)


def load_scoring(plan: ScoringPlan) -> ScoringContext:
    """Load the weights of the models that are merged and scored.

    Raises:
        UserError: weights that cannot be read or contain NaN.
    """
    return ScoringContext(**vars(plan), **_load_models(plan))


def _load_models(plan: ScoringPlan) -> dict[str, Any]:
    """Return the attributes that `ScoringContext` adds to a plan."""
    config = plan.config
    _, seed = load_model(config.seed, mesh=plan.mesh)
    experts = {
        setting: [
            load_model(named[slot].model, paths=plan.paths, mesh=plan.mesh)[1]
            for slot in config.slots
        ]
        for setting, named in plan.settings.items()
    }
    # Each program runs only a few times, so compilation time matters more than execution time.
    # A race comes back to each program, so that those of an iteration stay in the cache.
    compile_cache = CompileCache(quick=True, capacity=_CACHED_MERGES)
    mergers = {
        setting: Merger(
            seed,
            trees,
            slots=config.slots,
            scope=plan.paths,
            num_layers=plan.model.num_layers,
            compile_cache=compile_cache,
        )
        for setting, trees in experts.items()
    }
    return {"seed": seed, "experts": experts, "mergers": mergers}
