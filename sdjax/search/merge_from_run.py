"""`sdjax merge --run`: a program that a run has discovered, applied to the run's models."""

from __future__ import annotations

from pathlib import Path

import jax

from sdjax.core.errors import UserError
from sdjax.merging.recipe.output_files import PROGRAM, Provenance
from sdjax.merging.recipe.pipeline import MergeResult
from sdjax.merging.recipe.stream import OnTensor
from sdjax.programs.merge_from_source import apply, open_models
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.search.config_reader import config_from
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT


def merge_discovered(
    run: Path, rank: int, out: Path, *, on_tensor: OnTensor | None = None
) -> MergeResult:
    """Write the model that the program of a rank makes, as the run has scored it.

    rank: from 1, by the run's metric on the development problems, ties by identity.
    Raises UserError where there is no run, or not so many programs in it.
    """
    with Store.open(run) as store:
        config = config_from(store.run().config, str(run))
        identities = _ranked(store, config.task.metric)
        if not 1 <= rank <= len(identities):
            raise UserError(
                f"{run}: has {len(identities)} scored programs, none of rank {rank}; "
                f"choose 1 to {len(identities)}"
            )
        identity = identities[rank - 1]
        ir, source = store.ir_of(identity), store.programs()[identity].source
    experts = {slot: config.experts[slot].model for slot in config.slots}
    models = open_models(config.seed, experts, Path.cwd())
    signature = models.signature(config.scope, config.sandbox)
    algorithm = to_algorithm(verify_ir(ir, signature), name=f"program {identity[:12]}")
    return apply(
        algorithm,
        models,
        config.scope,
        out,
        origin=Provenance(method=f"the program of rank {rank} of {run}", file=PROGRAM, text=source),
        key=merge_key(config.random),
        on_tensor=on_tensor,
    )


def merge_key(random: int) -> jax.Array:
    """The key with which a run merges (`RunContext.fold("merge")`)."""
    return jax.random.fold_in(jax.random.key(random), int.from_bytes(b"merg", "big"))


def _ranked(store: Store, metric: str) -> list[str]:
    """Identities of the programs that are scored completely, the best first."""
    scores = {
        summary.candidate: getattr(summary, metric)
        for summary in store.summaries(DEVELOPMENT)
        if summary.complete
    }
    programs = [c for c in store.candidates().values() if c.kind == "program" and c.name in scores]
    programs.sort(key=lambda one: (-scores[one.name], one.identity or ""))
    return [one.identity for one in programs if one.identity]
