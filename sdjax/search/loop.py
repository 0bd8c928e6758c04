"""The loop: generate, admit, apply, score, refine, again and again; then the test, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sdjax.core.progress import progress_bar
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.models.lora import Adapter
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.baselines import (
    check_methods,
    expert_candidate,
    grid_methods,
    score_baseline,
    score_baselines,
    tuned_methods,
)
from sdjax.search.config import RunConfig
from sdjax.search.context import TRANSFER, RunContext, build_context
from sdjax.search.multihost import open_sandbox, open_store
from sdjax.search.phases import (
    choose_pairs,
    development_scores,
    generate,
    judge,
    refine,
    score_program,
    score_programs,
    scored_samples,
)
from sdjax.search.store import Store
from sdjax.search.types import (
    MAIN,
    TEST,
    Checkpoint,
    Lineage,
    Setting,
)

GENERATORS = "generators"

Say = Callable[[str], None]


def run(config: RunConfig, folder: Path, *, say: Say = lambda line: None) -> None:
    """Runs the loop in a folder, or goes on with the run that it holds.

    A run that is killed at any point and started again ends with the same result. On several
    processes every one calls this, on a folder that they share.

    Args:
        config: of the run; that of the folder's run, where there is one.
        folder: gets the store and the generators.
        say: called with one line of news a phase.

    Raises:
        UserError: anything that the user can mend; what was computed is kept.
    """
    check_methods(config)
    bench = build_context(config)
    with open_store(config, folder) as store:
        _save_settings(bench, store)
        with GeneratorCheckpoints(folder / GENERATORS) as checkpoints:
            with timed(store, 0, "baselines"):
                score_baselines(bench, store)
            scores = development_scores(bench, store)
            best = max(tuned_methods(bench, store), key=scores.__getitem__, default="seed")
            say(f"baselines: seed {scores['seed']:.3f}, best {best} {scores[best]:.3f}")
            with open_sandbox(bench) as sandbox:
                for iteration in range(1, config.iterations + 1):
                    iterate(bench, store, checkpoints, sandbox, iteration)
                    say(_summary(bench, store, iteration))
        with timed(store, 0, "test"):
            test(bench, store)
        store.finish()


def iterate(
    bench: RunContext,
    store: Store,
    checkpoints: GeneratorCheckpoints,
    sandbox: Sandbox | None,
    iteration: int,
) -> None:
    """One iteration; at its end the generator of the next one is on disk."""
    config = bench.config
    if config.training.enabled and iteration in _trained(store):
        return
    adapter = generator(bench, store, checkpoints, iteration)
    temperature = config.generation.temperature_at(iteration)
    parent = max((number for number in _trained(store) if number < iteration), default=None)
    if iteration not in {lineage.iteration for lineage in store.lineage()}:
        store.save_lineage(
            Lineage(
                iteration=iteration,
                generator=config.generator or config.seed,
                checkpoint=None if parent is None else _name(parent),
                temperature=temperature,
            )
        )
    with timed(store, iteration, "generate"):
        generate(
            bench,
            store,
            adapter,
            iteration=iteration,
            count=config.generation.samples,
            temperature=temperature,
        )
    with timed(store, iteration, "admit"):
        judge(bench, store, sandbox, iteration=iteration)
    with timed(store, iteration, "score"):
        score_programs(bench, store, iteration=iteration)
    pairs = choose_pairs(bench, store, iteration=iteration)
    if not config.training.enabled:
        return
    with timed(store, iteration, "refine"):
        # Without a pair there is nothing to learn from: the generator stays as it is.
        trained = refine(bench, store, adapter, pairs, iteration=iteration) if pairs else adapter
        # Every sample counts, so a checkpoint is as good as the generator that led to it.
        sampled = [program.score for program in scored_samples(bench, store, iteration)]
        checkpoints.save_adapter(iteration, trained, score=sum(sampled) / len(sampled))
        store.save_checkpoint(
            Checkpoint(
                name=_name(iteration),
                iteration=iteration,
                path=f"{GENERATORS}/{iteration}",
                detail={"pairs": len(pairs)},
            )
        )


def generator(
    bench: RunContext, store: Store, checkpoints: GeneratorCheckpoints, iteration: int
) -> Adapter:
    """The adapter that samples in an iteration: the newest one trained before it."""
    fresh = bench.fresh_adapter()
    parents = [number for number in _trained(store) if number < iteration]
    if not parents:
        return fresh
    return checkpoints.restore_adapter(max(parents), reference=fresh)[0]


def test(bench: RunContext, store: Store) -> None:
    """Scores the best programs and what they have to beat on the test problems, once.

    The same programs are then scored, untouched, on the transfer experts.
    """
    scores = development_scores(bench, store)
    programs = [
        candidate
        for name, candidate in store.candidates().items()
        if candidate.kind == "program" and name in scores
    ]
    programs.sort(key=lambda candidate: (-scores[candidate.name], candidate.identity or ""))
    best = programs[: bench.config.test.top_k]
    methods = grid_methods(bench.config)
    tuned = tuned_methods(bench, store)
    experts = [expert_candidate(slot) for slot in bench.config.slots]
    settings = [MAIN, *([TRANSFER] if bench.config.transfer else [])]
    total = len(settings) * (len(best) + len(tuned) + len(experts) + 1)
    with progress_bar("test", total) as advance:
        for setting in settings:
            for name in ["seed", *experts, *tuned]:
                score_baseline(bench, store, name, methods.get(name), TEST, setting)
                advance()
            for candidate in best:
                assert candidate.identity is not None
                score_program(bench, store, candidate.identity, TEST, setting)
                advance()


@contextmanager
def timed(store: Store, iteration: int, phase: str) -> Iterator[None]:
    """Keeps how long a phase took, unless an earlier run of it is on record."""
    start = time.monotonic()
    yield
    if (iteration, phase) not in store.phases():
        store.save_phase(iteration, phase, time.monotonic() - start)


def _summary(bench: RunContext, store: Store, iteration: int) -> str:
    samples = store.judged(iteration)
    admissible = sum(sample.admissible for sample in samples)
    novel = sum(sample.novel for sample in samples)
    scores = [program.score for program in scored_samples(bench, store, iteration)]
    return (
        f"iteration {iteration}: {len(samples)} samples, {admissible} admissible, {novel} novel, "
        f"development score mean {sum(scores) / len(scores):.3f}, best {max(scores):.3f}"
    )


def _save_settings(bench: RunContext, store: Store) -> None:
    config = bench.config
    if store.settings():
        return
    for name, experts in {MAIN: config.experts, TRANSFER: config.transfer}.items():
        if experts:
            store.save_setting(
                Setting(
                    name=name,
                    seed=config.seed,
                    slots={slot: experts[slot].model for slot in config.slots},
                    scope=str(config.scope),
                    task=config.task.name,
                )
            )


def _trained(store: Store) -> set[int]:
    return {checkpoint.iteration for checkpoint in store.checkpoints()}


def _name(iteration: int) -> str:
    return f"generator-{iteration}"
