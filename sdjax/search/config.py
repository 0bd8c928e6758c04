"""Run config schema: one frozen dataclass per section of the YAML file.

Defaults are sdjax's own; configs/paper-mistral-7b.yaml has the paper's settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import (
    STRICT,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    dataclass_from,
    errors_at,
    read_dataclass,
    replace_keys,
)
from sdjax.core.config_files import find_config
from sdjax.decoding.config import DecoderConfig
from sdjax.evaluation.racing import Race
from sdjax.generators.config import GeneratorConfig, SharesConfig, check_generators
from sdjax.programs import prompts
from sdjax.sandbox.config import SandboxConfig
from sdjax.search.coevolution_config import CoevolutionConfig
from sdjax.search.comparison_config import BaselinesConfig, ControlsConfig, RunTuningConfig
from sdjax.search.memory_config import MemoryConfig
from sdjax.search.selection_config import SelectionConfig
from sdjax.search.types import RESERVED_GENERATORS
from sdjax.sharding.config import MeshConfig
from sdjax.training.config import RunTrainingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertConfig:
    """Config of one expert.

    Attributes:
        model: "zoo:NAME", a folder, or OWNER/MODEL on Hugging Face, downloaded if necessary; with
            "+ADAPTER", a PEFT adapter is merged into it.
        description: one line about the expert, for the generator's prompt.
    """

    model: NonEmptyStr
    description: str = ""

    @model_validator(mode="after")
    def _check_description(self) -> ExpertConfig:
        if len(self.description.splitlines()) > 1:
            raise ValueError("description must be one line")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """Config of the task that models are scored on.

    Attributes:
        name: name of a task, path of a .jsonl file of problems, or module:Class of a
            task, which needs --trust-code.
        data: a file or folder with the task's problems; null reads those of gsm8k, math and svamp
            from the Hugging Face Hub.
        development: number of development problems; null uses the task's default.
        confirmation: number of the development problems that the search never sees. The finalists
            are scored on them before the test, which chooses the run's answer. Null sets half of
            the development problems aside, 0 none, as in the paper.
        test: number of test problems; null uses the task's default.
        shots: number of worked examples before each problem; null uses the task's default.
        prompt: format of prompts, plain text or the chat template.
        metric: answer filter whose accuracy is the score of a program.
    """

    name: NonEmptyStr
    data: NonEmptyStr | None = None
    development: PositiveInt | None = None
    confirmation: NonNegativeInt | None = None
    test: PositiveInt | None = None
    shots: NonNegativeInt | None = None
    prompt: Literal["plain", "chat"] = "plain"
    metric: Literal["strict", "flexible"] = "strict"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerationConfig:
    """Config of sampling programs from the generator.

    Attributes:
        prompt: a shipped prompt ("full", "short", "full-memory", "short-memory"), or a file, whose
            path is relative to the config file or to the working directory: text with placeholders,
            or a Jinja template if its name ends in .jinja.
        prompt_text: text of a prompt file; set when the config is read and kept with the run, so
            that resuming does not need the file.
        memory: what prompts show of earlier iterations, for which `prompt` must be a template; null
            has the same prompt in all iterations, as in the paper.
        samples: number of samples per iteration.
        seed_generator: whether the seed with its adapter writes programs. Without it, those of
            `generators` do, and nothing is trained.
        shares: how the samples are divided among several generators.
        temperature: sampling temperature of the first iteration.
        slope: decay of the temperature; iteration t uses temperature / (1 + slope * (t - 1)).
        top_p: nucleus sampling threshold.
        decoding: config of the generator's decoder.
    """

    prompt: NonEmptyStr = "full"
    prompt_text: NonEmptyStr | None = None
    memory: MemoryConfig | None = None
    samples: Annotated[int, Field(ge=1, le=1_000_000)]
    seed_generator: bool = True
    shares: SharesConfig = Field(default_factory=SharesConfig)
    temperature: PositiveFloat = 1.2
    slope: NonNegativeFloat = 0.2
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    decoding: DecoderConfig = Field(default_factory=DecoderConfig)

    def temperature_at(self, iteration: int) -> float:
        """Return the sampling temperature of an iteration (1-based)."""
        return self.temperature / (1 + self.slope * (iteration - 1))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TestConfig:
    """Config of the final test.

    Attributes:
        top_k: number of best programs by development score to score on the confirmation and on the
            test problems.
        ablations: number of those programs, best first, that are taken apart on the confirmation
            problems: scaled, without each constant, without each expert, and so on. Null takes all
            of them apart. There are none without confirmation problems.
    """

    __test__ = False  # pytest would collect a class named Test…

    top_k: PositiveInt = 15
    ablations: NonNegativeInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LimitsConfig:
    """Config of limits that end the search early; its results are then tested as usual.

    Attributes:
        max_hours: hours that the baselines and the iterations may take, over all resumptions. What
            is in progress is finished: a sample, the answers of a program, checking or training.
            Tuning, controls and the test follow and are not included.
        max_programs: number of programs that the search may sample, with those that are refused.
    """

    max_hours: PositiveFloat | None = None
    max_programs: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Config of a search run.

    Attributes:
        name: the run's name, shown in its report.
        seed: the model to improve, named like an expert; generators start from its weights.
        generator: PEFT adapter for the seed that the first generator starts from, written by
            `sdjax train` with `save: adapter`; null starts from the seed itself.
        experts: mapping from slot (expert_1, expert_2, …) to expert.
        transfer: experts on which the best programs are tested again; skipped if empty.
        scope: mlp, attention, all, or glob patterns over tensor paths.
        iterations: number of iterations.
        task: problems that merged models are scored on, and the metric.
        generation: how candidates are sampled from the generator.
        generators: generators in addition to the seed with its adapter, by name.
        selection: how preference pairs are made from scored programs.
        training: how the generator is trained on the pairs.
        evaluation: decoding of the answers to the task's problems.
        sandbox: limits on candidates, and the workers and confinement of the sandbox.
        baselines: hyperparameter grids of the human-designed methods.
        score: what the score of a program is: with "tuned", what its structure reaches when its
            constants are tuned, and programs that differ in these only are duplicates; with
            "as_written", what it reaches with its own constants, as in the paper.
        race: how programs race on the development problems; null has every program answer all of
            them, as in the paper.
        tuning: how the numbers of programs are tuned; null leaves programs as they were written,
            as in the paper, and needs `score: as_written`.
        controls: what the programs are compared with, at the budget of the run; null switches all
            controls off.
        coevolution: whether the best merged model of an iteration may become the next base, the
            next generator, or both; null keeps the seed, as in the paper.
        test: the final evaluation on the test problems.
        limits: limits that end the search early.
        rng_seed: seed for all random numbers of the run.
        mesh: device mesh over which models are sharded.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = {"random": "rng_seed"}

    name: NonEmptyStr
    seed: NonEmptyStr
    generator: NonEmptyStr | None = None
    experts: Annotated[dict[str, ExpertConfig], Field(min_length=1)]
    transfer: dict[str, ExpertConfig] = Field(default_factory=dict)
    scope: NonEmptyStr | Annotated[tuple[NonEmptyStr, ...], Field(min_length=1)] = "mlp"
    iterations: Annotated[int, Field(ge=1, le=1_000)] = 3
    task: TaskConfig
    generation: GenerationConfig
    generators: dict[str, GeneratorConfig] = Field(default_factory=dict)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    training: RunTrainingConfig
    evaluation: DecoderConfig = Field(default_factory=DecoderConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    baselines: BaselinesConfig = Field(default_factory=BaselinesConfig)
    score: Literal["tuned", "as_written"] = "tuned"
    race: Race | None = Field(default_factory=Race)
    tuning: RunTuningConfig | None = Field(default_factory=RunTuningConfig)
    controls: ControlsConfig | None = Field(default_factory=ControlsConfig)
    coevolution: CoevolutionConfig | None = None
    test: TestConfig = Field(default_factory=TestConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    rng_seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    mesh: MeshConfig = Field(default_factory=MeshConfig)

    @model_validator(mode="after")
    def _check_slots(self) -> RunConfig:
        for key, experts in (("experts", self.experts), ("transfer", self.transfer)):
            if experts and sorted(experts) != sorted(self.slots):
                raise ValueError(
                    f"the slots of {key} must be {', '.join(self.slots)}, not {', '.join(experts)}"
                )
        return self

    @model_validator(mode="after")
    def _check_score(self) -> RunConfig:
        if self.score == "tuned" and self.tuning is None:
            raise ValueError(
                "tuning is null, but score: tuned needs it; set score: as_written, or tuning: {}"
            )
        return self

    @model_validator(mode="after")
    def _check_on_policy(self) -> RunConfig:
        if self.training.objective == "entropic" and self.selection.iterations == "all":
            raise ValueError(
                "selection.iterations: all needs training.objective: pairs, since entropic learns "
                "from what the current generator wrote; set selection.iterations: current"
            )
        return self

    @model_validator(mode="after")
    def _check_generators(self) -> RunConfig:
        generation = self.generation
        check_generators(
            self.generators,
            RESERVED_GENERATORS,
            generation.shares,
            use_own=generation.seed_generator,
        )
        if self.training.enabled and not generation.seed_generator:
            raise ValueError(
                "generation.seed_generator is false, so that no generator can be trained; set "
                "training.enabled to false as well"
            )
        return self

    @model_validator(mode="after")
    def _check_coevolution(self) -> RunConfig:
        if self.coevolution is not None and self.task.confirmation == 0:
            raise ValueError(
                "coevolution compares merged models on confirmation problems, but "
                "task.confirmation is 0; set that to null, or set coevolution to null"
            )
        if (
            self.coevolution is not None
            and self.coevolution.generator
            and not self.generation.seed_generator
        ):
            raise ValueError(
                "coevolution.generator replaces the run's own generator, but "
                "generation.seed_generator is false; set either the other way"
            )
        return self

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots in order: expert_1, …, expert_k."""
        return tuple(f"expert_{n + 1}" for n in range(len(self.experts)))

    @property
    def trained_iterations(self) -> range:
        """The iterations after which the generator is trained."""
        last = self.iterations if self.training.after_last else self.iterations - 1
        return range(1, last + 1 if self.training.enabled else 1)

    @property
    def max_samples(self) -> int:
        """The number of programs that the search samples, unless it runs out of time."""
        count = self.iterations * self.generation.samples
        limit = self.limits.max_programs
        return count if limit is None else min(count, limit)

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON-compatible data; the inverse of `config_from`."""
        return asdict(self)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config of a run.

    Args:
        path: a YAML file or the name of a shipped config; see
            `sdjax.core.config_files.find_config`.
        overrides: assignments such as "iterations=2".
    """
    file = find_config(path)
    return read_prompt(read_dataclass(RunConfig, file, overrides), relative_to=file.parent)


def read_prompt(config: RunConfig, *, relative_to: Path | None = None) -> RunConfig:
    """Return the config with the text of its prompt file, unless it has the text already.

    Args:
        config: config of a run.
        relative_to: folder that is searched before the working directory.

    Raises:
        UserError: the prompt does not exist, is not text, or has an unknown placeholder.
    """
    generation = config.generation
    if generation.prompt_text is not None or generation.prompt in prompts.names():
        return config
    with errors_at(config, "generation.prompt"):
        text = prompts.find_prompt(generation.prompt, relative_to=relative_to).text
    return replace_keys(config, generation=replace(generation, prompt_text=text))


def prompt_template(config: RunConfig) -> prompts.PromptTemplate:
    """Return the prompt of a run, before rendering.

    Raises:
        UserError: the prompt does not exist or is invalid.
    """
    name, text = config.generation.prompt, config.generation.prompt_text
    with errors_at(config, "generation.prompt"):
        if text is None:
            return prompts.find_prompt(name)
        return prompts.parse_prompt(name, text)


# What the runs of earlier versions did, whose stored configs lack these keys.
_EARLIER_RUNS: Mapping[str, Any] = {
    "score": "as_written",
    "race": None,
    "tuning": None,
    "controls": None,
    "task": {"confirmation": 0},
}


def config_from(data: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Parse the config of a stored run from JSON-compatible data.

    Args:
        data: the inverse of `RunConfig.to_json`, also by an earlier version of sdjax.
        where: the run, with which error messages start.
        overrides: assignments such as "iterations=2".
    """
    return dataclass_from(RunConfig, _with_keys(data, _EARLIER_RUNS), where, overrides)


def _with_keys(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested data with the defaults of missing keys; sections are not added."""
    filled = dict(data)
    for key, default in defaults.items():
        if not isinstance(default, Mapping):
            filled.setdefault(key, default)
        elif isinstance(section := filled.get(key), Mapping):
            filled[key] = _with_keys(section, default)
    return filled


def method_entry(method: str, hyperparameters: Mapping[str, Any]) -> str:
    """Return the entry name of a method, such as "method:ties(density=0.4,scale=0.6)"."""
    inside = ",".join(f"{name}={value}" for name, value in sorted(hyperparameters.items()))
    return f"method:{method}({inside})"
