"""`sdjax merge --run`: merge a run's models by one of the programs that it discovered."""

from __future__ import annotations

from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.merging.recipe.output_files import PROGRAM, Provenance
from sdjax.merging.recipe.pipeline import MergeResult
from sdjax.merging.recipe.stream import OnTensor
from sdjax.programs.merge_from_source import apply, open_models
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.search.config import config_from
from sdjax.search.context import run_key
from sdjax.search.ranking import ranked_programs
from sdjax.search.store import Store


def merge_discovered(
    run: Path, rank: int, out: Path, *, on_tensor: OnTensor | None = None
) -> MergeResult:
    """Write the model that a discovered program makes, as the run has scored it.

    Args:
        run: the run folder.
        rank: rank of the program by development score, counted from 1.
        out: folder to write.
        on_tensor: called after each tensor.

    Raises:
        UserError: there is no run, or it has fewer scored programs.
    """
    with Store.open(run) as store:
        config = config_from(store.run().config, str(run))
        programs = ranked_programs(store, config.task.metric)
        if not 1 <= rank <= len(programs):
            raise UserError(
                f"{run}: there is no program of rank {rank}, the run has {len(programs)} scored "
                "programs; choose a lower --rank"
            )
        program = store.program(programs[rank - 1].identity or "")
    experts = {slot: config.experts[slot].model for slot in config.slots}
    models = open_models(config.seed, experts, Path.cwd())
    signature = models.signature(config.scope, config.sandbox)
    verified = verify_ir(program.ir, signature)
    algorithm = to_algorithm(verified, name=f"program {program.identity[:12]}")
    return apply(
        algorithm,
        models,
        config.scope,
        out,
        origin=Provenance(
            method=f"the program of rank {rank} of {run}", file=PROGRAM, text=program.source
        ),
        key=run_key(config.rng_seed, "merge"),
        on_tensor=on_tensor,
    )
