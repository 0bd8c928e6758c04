"""Transfer of a run's best programs to other experts, compared with human-designed methods.

A program is a function of tensors, so it merges any experts: fine-tunes of the run's seed, or of a
model of another family with tensors of other shapes. Nothing of it is tuned there. The methods are
scored twice: with the numbers that the run selected on its own experts, untouched like the
programs, and with numbers selected on the development problems with the new experts, from the run's
grids and by searches as in a run (see `sdjax.search.control_search`).

The results are kept in a store like that of a run, so an interrupted transfer resumes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from sdjax.core.config import dataclass_from
from sdjax.core.errors import UserError
from sdjax.decoding.config import fit_decoder_config
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.task import read_problems
from sdjax.io.hf_checkpoint import load_config
from sdjax.io.model_paths import locate
from sdjax.io.tokenizer import load_tokenizer
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import is_admissible
from sdjax.search.baselines import (
    expert_entry,
    score_baseline,
    score_baselines,
    tuned_methods,
)
from sdjax.search.comparison_config import ControlsConfig, RunTuningConfig
from sdjax.search.config import ExpertConfig, RunConfig
from sdjax.search.context import ScoringContext, load_scoring
from sdjax.search.control_search import tune_controls
from sdjax.search.controls import control_names, open_control, tuned_controls
from sdjax.search.final_test import score_test
from sdjax.search.grids import grid_methods
from sdjax.search.multihost import judge_all, open_sandbox, open_store
from sdjax.search.plan import ScoringPlan, load_task, plan_scoring
from sdjax.search.provenance import run_inputs
from sdjax.search.ranking import complete_scores, ranked
from sdjax.search.score_types import Application
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, TEST, Entry, Program, program_entry
from sdjax.search.winners import Winners, controls_that_fit, read_winners
from sdjax.sharding.config import MeshConfig
from sdjax.tuning.search import SearchConfig

logger = logging.getLogger(__name__)

_FAMILIES, _BUDGET = ("weights",), 20  # of searches, if the run has not tuned any control


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Settings of a transfer; None means that of the run, or the default.

    Attributes:
        base: model that the experts are fine-tunes of.
        top_k: number of the run's best programs.
        limit: maximum number of problems per split.
        max_new_tokens: maximum tokens per answer.
        batch: number of problems that are decoded at the same time.
        mesh: devices that the models are sharded over.
        dtype: dtype of activations and KV cache.
        allow_missing: layers of confinement that this machine may lack, whatever the run says.
        accept_versions: resume although versions or weights differ from those at the start.
        trust_code: whether the run's task may be a class, whose code runs unconfined.
        trust_limits: use limits of the run that are above the defaults.
        families: families and methods that are tuned with the new experts; by default those that
            the run tuned as controls, or one weight per expert.
        budget: number of development evaluations of each of these searches; 0 tunes none. By
            default that of the run's controls, or 20.
        search: other settings of the searches that differ from the run's, by name; see
            `sdjax.tuning.search.SearchConfig`.
    """

    base: str | None = None
    top_k: int = 1
    limit: int | None = None
    max_new_tokens: int | None = None
    batch: int | None = None
    mesh: MeshConfig | None = None
    dtype: DTypeLike | None = None
    allow_missing: tuple[str, ...] = ()
    accept_versions: bool = False
    trust_code: bool = False
    trust_limits: bool = False
    families: tuple[str, ...] = ()
    budget: int | None = None
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A finished transfer, whose scores are in a store.

    Attributes:
        config: config of the transfer, with its base and experts.
        winners: what was transferred.
        tuned: the best hyperparameters of each method on each grid and the tuned controls, with the
            new experts, best first, as names of entries.
        refused: the reason for each program and method of the run that cannot merge these models,
            by entry.
    """

    config: RunConfig
    winners: Winners
    tuned: tuple[str, ...]
    refused: Mapping[str, str]

    @property
    def untouched(self) -> tuple[str, ...]:
        """The run's methods that merge these models, best in the run first, as entries."""
        names = (entry.name for entry in self.winners.methods)
        return tuple(name for name in names if name not in self.refused)


def transfer(
    run: Path, experts: Mapping[str, str], folder: Path, options: TransferOptions
) -> Transfer:
    """Apply the best programs of a run to other experts, and score them and the methods.

    Args:
        run: folder of the run.
        experts: the model of each of the run's experts, by name.
        folder: folder of the results, which resumes a transfer that it contains.
        options: settings.

    Raises:
        UserError: the run does not exist or has no scored program, an expert is missing or
            unknown, a model does not exist or does not match the base, or the folder contains
            another transfer.
    """
    winners, plan = plan_transfer(run, experts, options)
    for line in _announcement(plan, winners, run):
        logger.info("%s", line)
    context = load_scoring(plan)
    with open_store(context, folder, accept_versions=options.accept_versions) as store:
        save_settings(plan, store)
        score_baselines(context, store)
        if plan.config.tuning is not None:
            tune_controls(context, store, plan.config.tuning.search)
        controls, refused = controls_that_fit(plan, winners.methods)
        store.save(*controls)  # all of them, since one may be the base of another
        for entry in controls:
            score_baseline(context, store, entry.name, entry.detail, DEVELOPMENT)
        methods = [entry.name for entry in winners.methods if entry.name not in refused]
        here = [*tuned_methods(plan.config, store), *tuned_controls(store)]
        tuned = ranked(_only(here, complete_scores(store, plan.config.task.metric)))
        programs = [program_entry(one.identity) for one in winners.programs]
        with open_sandbox(context) as sandbox:
            _judge_programs(context, store, sandbox, (*winners.bases, *winners.programs))
            names = ["seed", *map(expert_entry, plan.config.slots), *methods, *tuned]
            entries: dict[str, str | None] = dict.fromkeys(names)
            entries |= {program_entry(one.identity): one.identity for one in winners.programs}
            score_test(context, store, sandbox, entries)
        refused |= _refused(store, [*methods, *programs])
    return Transfer(config=plan.config, winners=winners, tuned=tuple(tuned), refused=refused)


def plan_transfer(
    run: Path, experts: Mapping[str, str], options: TransferOptions
) -> tuple[Winners, ScoringPlan]:
    """Return what a transfer applies, and its models and problems, without their weights.

    Raises:
        UserError: as in `transfer`.
    """
    winners = read_winners(
        run,
        options.top_k,
        allow_missing=options.allow_missing,
        trust_limits=options.trust_limits,
    )
    return winners, _plan(winners, experts, options, str(run))


def transfer_request(winners: Winners, plan: ScoringPlan) -> dict[str, Any]:
    """Return what determines the results of a transfer, JSON-compatible.

    It contains fingerprints of the problems and of the weights, which are loaded for it.
    """
    request = {
        "config": plan.config.to_json(),
        "inputs": run_inputs(load_scoring(plan)),
        "untouched": winners.untouched(),
    }
    return json.loads(json.dumps(request))


def _plan(
    winners: Winners, experts: Mapping[str, str], options: TransferOptions, where: str
) -> ScoringPlan:
    """Return the plan of the transfer: the run's, with other models and devices."""
    config = winners.config
    _check_names(experts, config, where)
    config = dataclasses.replace(
        config,
        seed=options.base or config.seed,
        generator=None,
        experts={slot: ExpertConfig(model=experts[slot]) for slot in config.slots},
        transfer={},
        score="as_written",
        race=None,
        **_searches(winners, options),
        mesh=options.mesh or MeshConfig(),
        test=dataclasses.replace(config.test, top_k=options.top_k),
    )
    config = _fit_decoder(config, options)
    plan = plan_scoring(config, trust_code=options.trust_code)
    _check_families(plan)
    decoder = Decoder(
        plan.model,
        config.evaluation,
        tokenizer=plan.tokenizer,
        compute_dtype=options.dtype,
        mesh=plan.mesh,
    )
    problems = {split: items[: options.limit] for split, items in plan.problems.items()}
    return dataclasses.replace(plan, eval_decoder=decoder, problems=problems)


def _searches(winners: Winners, options: TransferOptions) -> dict[str, Any]:
    """Return the sections of a config for what is tuned with the new experts."""
    if options.budget is not None and options.budget < 0:
        raise UserError(
            f"--budget {options.budget} is negative; give 0 or more (0 tunes nothing by search)"
        )
    if options.budget == 0:
        if options.families:
            raise UserError(
                f"--budget 0 tunes nothing, so --tune {options.families[0]} has no effect; remove "
                "either"
            )
        return {"tuning": None, "controls": None}
    tuning = winners.config.tuning
    settings = {} if tuning is None else dataclasses.asdict(tuning.search)
    budget = options.budget or winners.budget or _BUDGET
    settings |= {"starts": 1, **options.search, "budget": budget}
    families = options.families or winners.families or _FAMILIES
    return {
        "tuning": RunTuningConfig(
            programs=0, search=dataclass_from(SearchConfig, settings, "transfer")
        ),
        "controls": ControlsConfig(
            tuned=tuple(dict.fromkeys(families)), random=False, untrained=False
        ),
    }


def _check_families(plan: ScoringPlan) -> None:
    """Raise UserError if a family is unknown or does not fit the models."""
    for family in control_names(plan.config):
        try:
            open_control(plan, family)
        except UserError as error:
            raise UserError(f"--tune {family}: {error}") from None


def _check_names(experts: Mapping[str, str], config: RunConfig, where: str) -> None:
    """Raise UserError unless there is one model for each of the run's experts."""
    slots = ", ".join(config.slots)
    if unknown := [name for name in experts if name not in config.slots]:
        raise UserError(f"{where}: the run has no expert {unknown[0]}; its experts are {slots}")
    if missing := [slot for slot in config.slots if slot not in experts]:
        options = " ".join(f"--expert {slot}=MODEL" for slot in missing)
        raise UserError(
            f"{where}: its programs merge {slots}, but no model is given for "
            f"{', '.join(missing)}; add {options}"
        )


def _fit_decoder(config: RunConfig, options: TransferOptions) -> RunConfig:
    """Return the config with decoder sizes for another tokenizer or number of slots.

    The run's own sizes are kept if nothing else is requested, since a greedy answer may depend on
    them at near-ties of two tokens.
    """
    new_tokens = options.max_new_tokens or config.evaluation.max_new_tokens
    if options.base is None and options.batch is None:
        sizes = dataclasses.replace(config.evaluation, max_new_tokens=new_tokens)
        return dataclasses.replace(config, evaluation=sizes)
    folder = locate(config.seed)[0]
    tokenizer, task = load_tokenizer(folder), load_task(config, trust_code=options.trust_code)
    problems = [one for split in (DEVELOPMENT, TEST) for one in read_problems(task, split)]
    prompts = build_prompts(task, problems, tokenizer, chat=config.task.prompt == "chat")
    sizes = fit_decoder_config(
        load_config(folder), [one.tokens for one in prompts], new_tokens, slots=options.batch
    )
    return dataclasses.replace(config, evaluation=sizes)


def _announcement(plan: ScoringPlan, winners: Winners, run: Path) -> list[str]:
    config, count = plan.config, len(winners.programs)
    models = ", ".join(f"{slot}={config.experts[slot].model}" for slot in config.slots)
    problems = f"{len(plan.problems[DEVELOPMENT]):,} development problems"
    here = f"{len(grid_methods(config))} points of its grids"
    if config.tuning is not None:
        search = config.tuning.search
        here += (
            f" and {', '.join(control_names(config))}, each tuned with at most {search.budget:,} "
            f"evaluation{'s' * (search.budget > 1)},"
        )
    return [
        f"transfer of {count} program{'' if count == 1 else 's'} of {run} to {models}; base "
        f"{config.seed}",
        f"methods: {len(winners.methods)} as tuned by the run, and {here} on {problems}; test: "
        f"{len(plan.problems[TEST]):,} problems of {plan.task.name}",
    ]


def _judge_programs(
    context: ScoringContext, store: Store, sandbox: Sandbox | None, programs: Sequence[Program]
) -> None:
    """Save each program as an array program for the shapes of these models.

    Its name remains that in the run, though its identity may differ for other shapes.
    """
    known = store.by_key(Program)
    missing = [program for program in programs if program.identity not in known]
    for index, verdict, _ in judge_all(sandbox, [program.source for program in missing]):
        program = missing[index]
        name = program_entry(program.identity)
        entry = Entry(name=name, kind="program", identity=program.identity)
        if is_admissible(verdict.verdict) and verdict.ir is not None:
            store.save(dataclasses.replace(program, ir=verdict.ir, cost=verdict.cost), entry)
            continue
        refused = Application(
            entry=name,
            verdict=verdict.verdict,
            rule=verdict.rule,
            message=verdict.message,
            change=0.0,
        )
        store.save(dataclasses.replace(program, ir=""), entry, refused)


def _refused(store: Store, names: Sequence[str]) -> dict[str, str]:
    """Return the reason for each of these entries whose merge was refused."""
    applications = store.by_key(Application, setting=MAIN)
    return {
        name: f"{one.verdict} ({one.rule}): {one.message}" if one.message else one.verdict
        for name in names
        if (one := applications.get(name)) is not None and not one.admitted
    }


def _only(names: Sequence[str], scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of these entries; one whose merge is not finite has none."""
    return {name: scores[name] for name in names if name in scores}
