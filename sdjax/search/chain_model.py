"""The merged model of a chain of programs, for commands that need no problems to be loaded.

In a run, `sdjax.search.bases` merges the same models.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.params import param_specs
from sdjax.models.types import Params
from sdjax.programs.signature import model_signature
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.config import SandboxConfig
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.apply_candidate import trial_of_merger
from sdjax.search.base_chains import chain_of_entry
from sdjax.search.bases import experts_on_base
from sdjax.search.config import RunConfig
from sdjax.search.context import run_key, verify_stored
from sdjax.search.store import Store
from sdjax.search.types import Entry, Program, program_entry


def programs_of_chain(store: Store, entry: Entry) -> list[Program]:
    """Return the programs that are applied one after another, the one of the entry last."""
    return [store.program(one.identity or "") for one in chain_of_entry(store, entry)]


def chain_model(
    config: RunConfig,
    programs: Sequence[Program],
    *,
    model: ModelConfig,
    seed: Params,
    limits: SandboxConfig,
    mesh: Mesh | None = None,
) -> Params:
    """Return the model that the programs of a chain merge, the same as in the run.

    The programs may come from someone else, so that each is tried in the sandbox first.

    Args:
        config: config of the run.
        programs: the programs of the chain, first to last.
        model: config of the seed.
        seed: parameters of the seed.
        limits: limits on programs, and the layers of confinement that this machine may lack.
        mesh: devices that the seed is sharded over.

    Raises:
        UserError: a program is refused, or a model cannot be read.
    """
    paths = select_paths(param_specs(model), config.scope)
    experts = [
        load_model(config.experts[slot].model, paths=paths, mesh=mesh)[1] for slot in config.slots
    ]
    signature = model_signature(model, config.slots, config.scope, limits)
    compile_cache = CompileCache(quick=True)  # as in a run
    base = seed
    with Sandbox(signature, workers=1, allow_missing=limits.allow_missing) as sandbox:
        for program in programs:
            title = program_entry(program.identity[:12])
            verified = verify_stored(program, signature)
            merger = Merger(
                base,
                experts if base is seed else experts_on_base(config, experts, seed=seed, base=base),
                slots=config.slots,
                scope=paths,
                num_layers=model.num_layers,
                compile_cache=compile_cache,
            )
            if jax.default_backend() == "cpu":
                refusal = sandbox.try_merge(program.ir, trial_of_merger(merger))
                if refusal is not None:
                    raise UserError(
                        f"{title}: {refusal.verdict} ({refusal.rule}): {refusal.message}"
                    )
            merged = merger(
                to_algorithm(verified, name=program_entry(program.identity)),
                key=run_key(config.rng_seed, "merge"),
                max_memory=verified.max_memory,
            )
            if not merged.finite:
                raise UserError(f"{title}: the merged weights are not finite")
            base = merged.params
    return base
