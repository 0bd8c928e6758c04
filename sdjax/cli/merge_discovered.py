"""The merged model of a program that a run discovered: `sdjax merge --run`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from sdjax.merging.recipe.pipeline import MergeResult
    from sdjax.sandbox.config import SandboxConfig
    from sdjax.search.config import RunConfig
    from sdjax.search.types import Program


def merge_discovered(
    run: Path,
    rank: int,
    out: Path,
    *,
    trust_limits: bool = False,
    allow_missing: Collection[str] = (),
    **options: Any,
) -> MergeResult:
    """Write the merged model of a discovered program, identical to the one that the run scored.

    The model of a program on another base than the seed is that of its whole chain.

    Args:
        run: folder of the run.
        rank: rank of the program, as in the report; 1 is the run's best.
        out: folder of the result.
        trust_limits: use limits of the run that are above the defaults.
        allow_missing: layers of confinement that this machine may lack, whatever the run says.
        options: as in `merge_algorithm`.

    Raises:
        UserError: the run does not exist, has fewer scored programs or has limits that are not
            trusted, or see `merge_recipe`.
    """
    from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
    from sdjax.merging.recipe.model_card import PROGRAM, Provenance
    from sdjax.programs.signature import merge_signature, merge_trial
    from sdjax.sandbox.algorithm import to_algorithm
    from sdjax.sandbox.sandbox import Sandbox
    from sdjax.search.chain_model import programs_of_chain
    from sdjax.search.context import run_key, verify_stored
    from sdjax.search.limits import limits_of_run
    from sdjax.search.ranking import final_ranking
    from sdjax.search.store import Store

    with Store.open(run) as store:
        config = store.config()
        limits = limits_of_run(config, run, trusted=trust_limits)
        programs = final_ranking(store, config.task.metric)
        if not programs:
            raise UserError(f"{run}: the run has no scored program; resume it until it has one")
        if not 1 <= rank <= len(programs):
            raise UserError(
                f"{run}: no program of rank {rank}: the run has {len(programs)} scored programs; "
                "lower --rank"
            )
        chain = programs_of_chain(store, programs[rank - 1])
        program = chain[-1]
    experts = {slot: config.experts[slot].model for slot in config.slots}
    models = open_models(config.seed, experts, Path.cwd())
    signature = merge_signature(models, config.scope, limits)
    verified = verify_stored(program, signature)
    merged = None
    if len(chain) > 1:
        merged = _merge_chain(config, chain, replace(limits, allow_missing=tuple(allow_missing)))
    else:
        with Sandbox(signature, workers=1, allow_missing=allow_missing) as sandbox:
            refusal = sandbox.try_merge(program.ir, merge_trial(models, config.scope))
        if refusal is not None:
            raise UserError(f"{run}: {refusal.verdict} ({refusal.rule}): {refusal.message}")
    return merge_algorithm(
        to_algorithm(verified, name=f"program {program.identity[:12]}"),
        models,
        config.scope,
        out,
        provenance=Provenance(
            method=" after ".join(f"program {one.identity[:12]}" for one in reversed(chain))
            + f", rank {rank} of {run.resolve().name}",
            file=PROGRAM,
            text=_chain_text(chain, config),
            seed=config.rng_seed,
        ),
        key=run_key(config.rng_seed, "merge"),
        merged=merged,
        **options,
    )


def _merge_chain(
    config: RunConfig, chain: Sequence[Program], limits: SandboxConfig
) -> dict[str, np.ndarray]:
    """Return the tensors of a chain's merged model by path; it is merged in memory."""
    import numpy as np

    from sdjax.io.hf_checkpoint import load_model
    from sdjax.models.tree import flatten
    from sdjax.search.chain_model import chain_model

    model, seed = load_model(config.seed)
    params = chain_model(config, chain, model=model, seed=seed, limits=limits)
    return {path: np.asarray(array) for path, array in flatten(params).items()}


def _chain_text(chain: Sequence[Program], config: RunConfig) -> str:
    """Return the source of a program; of several, one after another with comments."""
    if len(chain) == 1:
        return chain[0].source
    assert config.coevolution is not None
    head = (
        f"# {len(chain)} programs, applied one after another: each to the merged model of the one "
        f"before.\n# Task vectors: {config.coevolution.task_vectors}.\n"
    )
    parts = (f"\n# Program {n} of {len(chain)}\n{one.source}" for n, one in enumerate(chain, 1))
    return head + "".join(parts)
