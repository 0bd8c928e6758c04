"""Announcement of a run in a few lines, and the dry run that only announces it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

from sdjax.core.errors import UserError
from sdjax.search.attempts import DATABASE_FILE
from sdjax.search.config import RunConfig, read_prompt
from sdjax.search.controls import (
    check_controls,
    control_names,
    program_controls,
    samples_of_control,
)
from sdjax.search.database import is_unused
from sdjax.search.generator_plan import available_programs, describe_generators
from sdjax.search.grids import grid_methods
from sdjax.search.multihost import main_process_layers
from sdjax.search.plan import RunPlan, plan_run
from sdjax.search.provenance import plan_inputs
from sdjax.search.resume import run_changes
from sdjax.search.store import Store
from sdjax.search.types import CONFIRMATION, DEVELOPMENT, TEST, UNTRAINED, Change


def announce(plan: RunPlan, folder: Path | None = None) -> list[str]:
    """Return lines about the folder, the devices, the models and the amount of work of a run."""
    config = plan.config
    where = "" if folder is None else f" in {folder}"
    methods = len(grid_methods(config))
    experts = [expert.model for expert in config.experts.values()]
    transfer = [expert.model for expert in config.transfer.values()]
    models = f"seed {config.seed}; {_count(len(experts), 'expert')}: {', '.join(experts)}"
    if transfer:
        models += f"; transfer to {', '.join(transfer)}"
    problems = {split: len(plan.problems[split]) for split in (DEVELOPMENT, TEST)}
    test_models = 1 + len(experts) + tuned_method_count(config)
    test_programs = config.test.top_k * (1 + len(program_controls(config)))
    confirmed = len(plan.problems.get(CONFIRMATION, ()))
    confirmation = f"{_count(confirmed, 'confirmation problem')} and " if confirmed else ""
    return [
        f"run {config.name}{where}, on {_describe_devices()}",
        models,
        *describe_generators(config, plan.generators, plan.renderer),
        f"search: {_describe_programs(plan)} and "
        f"{_count(1 + len(experts) + methods, 'baseline')} on "
        f"{_count(problems[DEVELOPMENT], 'development problem')} of {plan.task.name}",
        *_describe_limits(config),
        *_describe_training(config),
        *_describe_memory(config),
        *_describe_controls(config),
        f"test: the best {_count(test_programs, 'program')} and at most "
        f"{_count(test_models, 'baseline')} on {confirmation}"
        f"{_count(problems[TEST], 'test problem')}"
        f"{', with the experts of the search and of the transfer' if transfer else ''}",
    ]


def _describe_programs(plan: RunPlan) -> str:
    config = plan.config
    samples, iterations = config.generation.samples, _count(config.iterations, "iteration")
    available = available_programs(config, plan.generators)
    if available is not None and available < config.max_samples:
        folder = "folder" if len(plan.generators.programs) == 1 else "folders"
        written = f"the {_count(available, 'program')} of the {folder}"
        return f"{written} (at most {iterations} of {samples:,})"
    return f"{_count(config.iterations * samples, 'program')} ({iterations} of {samples:,})"


def _describe_limits(config: RunConfig) -> list[str]:
    limits = []
    if config.limits.max_programs is not None:
        limits.append(_count(config.limits.max_programs, "program"))
    if config.limits.max_hours is not None:
        hours = config.limits.max_hours
        limits.append(f"{hours:g} hour{'' if hours == 1 else 's'}")
    return [f"limits: the search ends after {' or '.join(limits)}"] if limits else []


def _describe_training(config: RunConfig) -> list[str]:
    """Return a note if the training forgets what earlier iterations have taught."""
    from_first = config.training.start == "first" and config.selection.iterations == "current"
    if not from_first or len(config.trained_iterations) < 2:
        return []
    return [
        "training.start: first with selection.iterations: current: each generator learns from the "
        "programs of one iteration only; set selection.iterations to all, as in EvoTune"
    ]


def _describe_memory(config: RunConfig) -> list[str]:
    memory = config.generation.memory
    if memory is None:
        return []
    archive = " from an archive of the best of each kind" if memory.archive else ""
    return [
        f"prompts: {config.generation.prompt}, with at most "
        f"{_count(memory.programs, 'earlier program')}, drawn by {memory.parents}{archive}"
    ]


def _describe_controls(config: RunConfig) -> list[str]:
    lines = []
    if config.tuning is not None:
        programs = _count(config.tuning.programs, "program")
        evaluations = _count(config.tuning.search.budget, "evaluation")
        lines.append(
            f"tuning: at most {programs}, each with {evaluations} on the development problems"
        )
    controls = []
    if control_names(config):
        controls.append(f"{', '.join(control_names(config))}, tuned")
    for purpose in program_controls(config):
        samples = samples_of_control(config, purpose)
        controls.append(f"at most {_count(samples, f'{purpose} program')}")
    if controls:
        lines.append(
            f"controls: {'; '.join(controls)}; each with at most as many evaluated problems as "
            "the programs of the search"
        )
    wanted = config.controls is not None and config.controls.untrained
    if wanted and UNTRAINED not in program_controls(config):
        reason = "with one iteration" if config.training.enabled else "without training"
        lines.append(
            f"controls.untrained adds nothing {reason}: the programs of the search are those of "
            "the untrained generator"
        )
    return lines


def announce_resumption(store: Store) -> list[str]:
    """Return a line about the results that a run has already; none for a new run."""
    samples = store.judged()
    scored = sum(summary.complete for summary in store.summaries(DEVELOPMENT))
    if not samples and not scored:
        return []
    return [
        f"resuming with {_count(len(samples), 'sampled program')} and "
        f"{_count(scored, 'scored model')}"
    ]


def tuned_method_count(config: RunConfig) -> int:
    """Return the number of methods and grids, each with at most one best point, and controls.

    A tuned control has at most two results: that of the gradient, and that of CMA-ES.
    """
    controls = 2 * len(control_names(config))
    return controls + sum(len(grid) for grid in (config.baselines.paper, config.baselines.fine))


def dry_run(
    config: RunConfig,
    folder: Path | None,
    *,
    resume: bool,
    accept_versions: bool = False,
    trust_code: bool = False,
) -> list[str]:
    """Check everything that can be checked without computing; write nothing.

    Args:
        config: config of the run.
        folder: the run folder, if it is known.
        resume: whether the folder contains the run.
        accept_versions: resume although versions or inputs differ.
        trust_code: whether the config may name a class as its task.

    Returns:
        the announcement of the run.

    Raises:
        UserError: see `plan_run`; a missing layer of the sandbox; a folder that cannot be used; or
            a config, versions or inputs that the run cannot be resumed with.
    """
    config = read_prompt(config)
    changes: Sequence[Change] = ()
    if folder is not None and not resume:
        check_new_folder(folder)
    plan = plan_run(config, trust_code=trust_code)
    check_controls(plan)
    layers = main_process_layers(config)
    lines = announce(plan, folder)
    if folder is not None and resume:
        with Store.open(folder) as store:
            changes = run_changes(store, config, plan_inputs(plan), accept_versions=accept_versions)
            lines += announce_resumption(store)
    lines += [f"change of {change.key}: {change.old} -> {change.new}" for change in changes]
    lines.append(f"sandbox: {', '.join(layers)}")
    lines.append(
        "dry run: the config, models, task, prompts and sandbox are usable; nothing written"
    )
    if resume:
        lines.append(
            "not checked: whether the weights of the seed and the experts are those of the run"
        )
    return lines


def check_new_folder(folder: Path) -> None:
    """Raise UserError if the folder of a new run cannot be used."""
    if (folder / DATABASE_FILE).exists():
        resumed = f"--resume {shlex.quote(str(folder))}"
        raise UserError(
            f"{folder}: not empty; choose another --out, or resume its run with {resumed}"
        )
    if folder.is_dir() and not is_unused(folder):
        raise UserError(f"{folder}: not empty, and not a run; choose another --out")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{folder}: {existing} is not a folder; choose another --out")
    if not os.access(existing, os.W_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = "the file system is read-only" if read_only else "permission denied"
        raise UserError(f"{folder}: {reason}; choose another --out")


def _describe_devices() -> str:
    device = jax.devices()[0]
    kind = "" if device.device_kind.lower() == device.platform else f" ({device.device_kind})"
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{_count(jax.device_count(), f'{device.platform} device')}{kind}{hosts}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
