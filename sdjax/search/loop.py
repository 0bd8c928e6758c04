"""The search loop: generate, judge, score, refine, repeat; then test once."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.evaluation.statistics import percent
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.io.peft import merged_base, write_adapter
from sdjax.models.lora import Adapter
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.ablations import ablate
from sdjax.search.announcement import announce, announce_resumption
from sdjax.search.answer import save_answer
from sdjax.search.base_identity import base_of_iteration, generator_base
from sdjax.search.baselines import score_baselines
from sdjax.search.bases import context_on_base
from sdjax.search.config import RunConfig, read_config, read_prompt
from sdjax.search.context import RunContext, load_context
from sdjax.search.control_bases import tune_controls_in_steps
from sdjax.search.control_programs import try_control_programs
from sdjax.search.control_search import control_settings, tune_controls
from sdjax.search.controls import (
    check_controls,
    control_names,
    program_controls,
)
from sdjax.search.final_test import confirm, score_run_test
from sdjax.search.grids import grid_methods
from sdjax.search.iteration_scores import score_programs
from sdjax.search.multihost import (
    check_resumption,
    main_process_layers,
    open_sandbox,
    open_store,
)
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.phases import generate, judge
from sdjax.search.plan import plan_run
from sdjax.search.promotion import promote
from sdjax.search.ranking import complete_scores, ranked, ranked_programs
from sdjax.search.refinement import choose_training_data, refine, scored_samples
from sdjax.search.run_limits import (
    OutOfPrograms,
    OutOfTime,
    complete_samples,
    end_if,
    end_reason,
    is_trained,
    planned_samples,
)
from sdjax.search.sampling import adapter_folder
from sdjax.search.score_types import Promotion
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.tune import tune_entries
from sdjax.search.types import SEARCH, Checkpoint, Lineage, Phase
from sdjax.sharding.multihost import broadcast_from_main

GENERATORS_FOLDER = "generators"
_MORE_PROGRAMS = "raise max_tokens_total of an endpoint in generators, or add programs to a folder"

logger = logging.getLogger(__name__)


def run_search(
    config: RunConfig | str | Path,
    folder: str | Path,
    *,
    accept_versions: bool = False,
    trust_code: bool = False,
) -> None:
    """Start a search run in a folder, or resume the run that the folder contains.

    The folder will contain the store `run.sqlite`, the generators' checkpoints, and the generator
    trained after each iteration but the last (see `training.after_last`) as a PEFT adapter,
    `adapters/iteration-N`. The result of a run that was killed and resumed is identical to that of
    an uninterrupted run. With several processes, every process must call this function with the
    same shared folder.

    Progress is logged: first the folder, the devices, the models and the amount of work, then the
    phases (see `sdjax.core.progress`), the result of each iteration, and the time that is left.

    Args:
        config: config of the run, or the path or shipped name of a YAML file. To resume a run, it
            must equal the run's config except for the keys that extend a run, such as `iterations`
            (see `sdjax.search.extension`).
        folder: the run folder; created if it does not exist.
        accept_versions: resume a run although versions of packages, weights or data differ from
            those that it was started with.
        trust_code: whether the config may name a class as its task, whose code runs unconfined in
            this process.

    Raises:
        UserError: a problem that the user can fix, such as a missing model; results are kept.

    Examples:
        A complete search on the tiny models that ship with the package takes a few minutes:

        >>> from sdjax.search.config import read_config
        >>> config = read_config("demo", ["iterations=1", "generation.samples=32"])
        >>> config.slots
        ('expert_1', 'expert_2', 'expert_3')
        >>> run_search(config, "runs/first")  # doctest: +SKIP
    """
    if not isinstance(config, RunConfig):
        config = read_config(config)
    config = read_prompt(config)
    folder = Path(folder)
    check_resumption(config, folder)
    plan = plan_run(config, trust_code=trust_code)
    check_controls(plan)
    main_process_layers(config)
    for line in announce(plan, folder):
        logger.info("%s", line)
    context = load_context(plan)
    with open_store(context, folder, accept_versions=accept_versions) as store:
        for line in announce_resumption(store):
            logger.info("%s", line)
        save_settings(context, store)
        clock = PhaseClock(context, store)
        with GeneratorCheckpoints(folder / GENERATORS_FOLDER) as checkpoints:
            with clock.timed(0, "baselines"):
                score_baselines(context, store, on_scored=clock.baseline_scored)
            logger.info("%s", _baseline_summary(context, store))
            with open_sandbox(context) as sandbox:
                run_iterations(context, store, checkpoints, sandbox, clock)
                if config.tuning is not None:
                    with clock.timed(0, "tune"):
                        tune_entries(context, store, sandbox)
                run_controls(context, store, sandbox, clock)
                with clock.timed(0, "confirm"):
                    confirm(context, store, sandbox)
                with clock.timed(0, "test"):
                    score_run_test(context, store, sandbox)
                save_answer(store, config.task.metric)
                with clock.timed(0, "ablate"):
                    ablate(context, store, sandbox)
        store.finish()


def run_iterations(
    context: RunContext,
    store: Store,
    checkpoints: GeneratorCheckpoints,
    sandbox: Sandbox | None,
    clock: PhaseClock,
) -> None:
    """Run all iterations, or those that the limits of the run and its generators leave.

    Raises:
        UserError: no program was scored.
    """
    config, advice = context.config, ""
    try:
        for iteration in range(1, len(planned_samples(config, store)) + 1):
            run_iteration(context, store, checkpoints, sandbox, iteration, clock)
            logger.info("%s", _iteration_summary(context, store, iteration))
            clock.log_estimate()
    except OutOfTime:
        if not ranked_programs(store, config.task.metric):
            raise UserError(
                f"{store.folder}: no program was scored within limits.max_hours = "
                f"{config.limits.max_hours:g}; use --resume with a larger --max-hours"
            ) from None
    except OutOfPrograms:
        if not ranked_programs(store, config.task.metric):
            raise UserError(
                f"{store.folder}: the generators have not written a program; {_MORE_PROGRAMS}"
            ) from None
        advice = f"; to continue it with --resume, {_MORE_PROGRAMS}"
    if reason := end_reason(config, store):
        logger.info("the search ends early, by %s%s", reason, advice)


def run_iteration(
    context: RunContext,
    store: Store,
    checkpoints: GeneratorCheckpoints,
    sandbox: Sandbox | None,
    iteration: int,
    clock: PhaseClock,
) -> None:
    """Run one iteration, up to saving the generator of the next iteration, if there is one.

    Raises:
        OutOfTime: a limit is reached before its programs are scored, or its generator is trained.
        OutOfPrograms: no generator has anything left to write.
    """
    config = context.config
    trained = _trained_iterations(store)
    if config.training.enabled and iteration in trained:
        export_generator(context, store, checkpoints, iteration)
        return
    adapter = load_generator(context, store, checkpoints, iteration)
    model = generator_base(store.select(Promotion), iteration)
    generator = context_on_base(context, store, model, sandbox=sandbox)
    temperature = config.generation.temperature_at(iteration)
    if iteration not in {lineage.iteration for lineage in store.select(Lineage)}:
        parent = max((number for number in trained if number < iteration), default=None)
        store.save(
            Lineage(
                iteration=iteration,
                generator=model or config.generator or config.seed,
                checkpoint=None if parent is None else _checkpoint_name(parent),
                temperature=temperature,
                base=base_of_iteration(store.select(Promotion), SEARCH, iteration),
                generator_base=model,
            )
        )
    # A complete phase keeps its samples, also if generators had fewer left than wanted.
    if iteration not in complete_samples(store):
        count = planned_samples(config, store)[iteration - 1]
        # If nothing was left to write then, the phase is not complete while it is sampled again.
        store.delete(Phase, iteration=iteration, name="generate")
        with clock.timed(iteration, "generate"):
            generate(
                generator,
                store,
                adapter,
                iteration=iteration,
                count=count,
                temperature=temperature,
                out_of_time=clock.out_of_time,
            )
        written = len(store.sample_numbers(iteration))
        if not written:
            raise OutOfPrograms
        if written < count:
            logger.warning(
                "iteration %d has %d of %d samples, since its generators have nothing left to "
                "write",
                *(iteration, written, count),
            )
    with clock.timed(iteration, "admit"):
        judge(context, store, sandbox, iteration=iteration)
    with clock.timed(iteration, "score"):
        score_programs(context, store, sandbox, iteration=iteration, out_of_time=clock.out_of_time)
    if config.coevolution is not None:
        with clock.timed(iteration, "promote"):
            promote(context, store, sandbox, iteration=iteration, adapter=adapter)
    data = choose_training_data(context, store, iteration=iteration)
    if not is_trained(config, store, iteration):
        return
    end_if(clock.out_of_time)
    with clock.timed(iteration, "refine"):
        model = generator_base(store.select(Promotion), iteration + 1)
        generator = context_on_base(context, store, model, sandbox=sandbox)
        next_adapter = refine(generator, store, adapter, data, iteration=iteration)
        # A checkpoint is scored by the mean over all samples of the generator it was trained from.
        scores = [sample.score for sample in scored_samples(context, store, iteration)]
        mean = sum(scores) / len(scores) if scores else 0.0
        checkpoints.save_adapter(iteration, next_adapter, score=mean)
        store.save(
            Checkpoint(
                name=_checkpoint_name(iteration),
                iteration=iteration,
                path=f"{GENERATORS_FOLDER}/{iteration}",
                detail=data.summary(),
            )
        )
        export_generator(context, store, checkpoints, iteration)


def run_controls(
    context: RunContext, store: Store, sandbox: Sandbox | None, clock: PhaseClock
) -> None:
    """Give the controls what the search had: as many evaluated problems as its programs took."""
    try_control_programs(context, store, sandbox, clock)
    if context.config.tuning is not None:
        for purpose in program_controls(context.config):
            with clock.timed(0, "tune", purpose):
                tune_entries(context, store, sandbox, purpose)
    if control_names(context.config):
        with clock.timed(0, "controls"):
            settings = control_settings(context, store)
            tune_controls(context, store, settings)
            tune_controls_in_steps(context, store, settings)


def load_generator(
    context: RunContext, store: Store, checkpoints: GeneratorCheckpoints, iteration: int
) -> Adapter:
    """Return the adapter of an iteration's generator: the newest one trained before it."""
    adapter = context.new_adapter()
    earlier = [number for number in _trained_iterations(store) if number < iteration]
    if not earlier:
        return adapter
    return checkpoints.restore_adapter(max(earlier), reference=adapter)[0]


def export_generator(
    context: RunContext, store: Store, checkpoints: GeneratorCheckpoints, iteration: int
) -> None:
    """Write the generator trained in an iteration as a PEFT adapter folder, unless it exists.

    A resumed run calls this for each trained iteration, so that an export that was interrupted, or
    a folder that was removed, is written again while the checkpoint exists.

    Args:
        context: the loaded run.
        store: the run's store.
        checkpoints: the run's checkpoints.
        iteration: number of the iteration.
    """
    path = adapter_folder(store.folder, iteration)
    if broadcast_from_main(lambda: bytes([path.exists()])) == b"\x01":
        return
    if iteration not in checkpoints.numbers():
        return
    adapter, _ = checkpoints.restore_adapter(iteration, reference=context.new_adapter())
    # The adapter of a merged model does not fit the seed.
    merged = generator_base(store.select(Promotion), iteration + 1)
    base = context.config.seed if merged is None else merged_base(store.folder.name, merged)
    write_adapter(path, context.model, adapter, base=base)


def _baseline_summary(context: RunContext, store: Store) -> str:
    metric = context.config.task.metric
    scores = complete_scores(store, metric)
    # A resumed run may have scored methods that its controls tuned, which are not baselines.
    methods = {name: scores[name] for name in grid_methods(context.config) if name in scores}
    summary = f"baselines: seed {percent(scores['seed'])}%"
    if not methods:
        return summary
    best = ranked(methods)[0]
    return f"{summary}, best method {best.removeprefix('method:')} {percent(scores[best])}%"


def _iteration_summary(context: RunContext, store: Store, iteration: int) -> str:
    samples = store.judged(iteration)
    admissible = sum(sample.admissible for sample in samples)
    novel = sum(sample.novel for sample in samples)
    scores = [sample.score for sample in scored_samples(context, store, iteration)]
    summary = (
        f"iteration {iteration}: {len(samples)} samples, {admissible} admissible, {novel} novel"
    )
    if not scores:
        return f"{summary}, none scored"
    mean = percent(sum(scores) / len(scores))
    summary += f", development score mean {mean}%, best {percent(max(scores))}%"
    return summary + held_out_note(store, iteration)


def held_out_note(store: Store, iteration: int) -> str:
    """Return a remark on the families that the training programs lack; empty without any."""
    novel = {s.identity for s in store.judged(iteration) if s.novel and s.identity}
    found = Counter(f for identity in novel for f in store.program(identity).held_out or ())
    listed = ", ".join(f"{family} ({count})" for family, count in sorted(found.items()))
    return f"; families that its training lacks: {listed}" if listed else ""


def _trained_iterations(store: Store) -> set[int]:
    return {checkpoint.iteration for checkpoint in store.select(Checkpoint)}


def _checkpoint_name(iteration: int) -> str:
    return f"generator-{iteration}"
