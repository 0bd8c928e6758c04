"""What a run is told to do: frozen, validated dataclasses, one section each.

`sdjax.search.config_reader` reads them from YAML. Every default that the paper leaves open is
written down here; its own values stand in configs/paper-mistral-7b.yaml.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import (
    STRICT,
    NonEmptyStr,
    NonNegativeFloat,
    Percent,
    PositiveFloat,
    PositiveInt,
)
from sdjax.sandbox.config import SandboxConfig
from sdjax.search.pairs import PairSettings
from sdjax.sharding.mesh import MeshConfig

Hyperparameter = bool | int | float | str
Grid = dict[str, dict[str, Annotated[tuple[Hyperparameter, ...], Field(min_length=1)]]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertConfig:
    """One expert.

    Attributes:
        model: "zoo:NAME", a folder, or a hub's name of a folder that is on this machine.
        description: one line for the generator's prompt.
    """

    model: NonEmptyStr
    description: str = ""

    @model_validator(mode="after")
    def _one_line(self) -> "ExpertConfig":
        if len(self.description.splitlines()) > 1:
            raise ValueError("description must be one line")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """What is scored.

    Attributes:
        name: of a task, the path of a .jsonl file of problems, or module:Class of a task.
        data: a file or folder with the task's problems; null asks the Hugging Face hub.
        development, test: problems of each split; null takes what the task has.
        shots: worked examples before each problem; null shows as many as the task's own.
        prompt: how a problem is put to the models; the same for all merges of a run.
        metric: the reading of an answer by which programs are ranked.
    """

    name: NonEmptyStr
    data: NonEmptyStr | None = None
    development: PositiveInt | None = None
    test: PositiveInt | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    prompt: Literal["plain", "chat"] = "plain"
    metric: Literal["strict", "flexible"] = "strict"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecodingConfig:
    """The sizes that decoding is compiled for: `sdjax.decoding.config.DecoderConfig`."""

    slots: PositiveInt = 64
    rows: PositiveInt = 32
    buckets: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 128, 256)
    max_new_tokens: PositiveInt = 64

    @model_validator(mode="after")
    def _sizes(self) -> "DecodingConfig":
        if self.rows > self.slots:
            raise ValueError(f"rows ({self.rows}) must be at most slots ({self.slots})")
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets {list(self.buckets)} must be distinct and ascending")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerationConfig:
    """How the generator samples programs.

    Attributes:
        prompt: file of sdjax/programs/prompts without its ending.
        samples: an iteration.
        temperature, slope: iteration t samples at temperature / (1 + slope (t - 1)).
    """

    prompt: NonEmptyStr = "full"
    samples: PositiveInt
    temperature: PositiveFloat = 1.2
    slope: NonNegativeFloat = 0.2
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    decoding: DecodingConfig = Field(default_factory=DecodingConfig)

    def temperature_at(self, iteration: int) -> float:
        """The temperature of iteration 1, 2, …"""
        return self.temperature / (1 + self.slope * (iteration - 1))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """Winners, losers and pairs; the same as `sdjax.search.pairs.PairSettings`."""

    winners_percent: Percent = 3.0
    losers_percent: Percent = 10.0
    elites: Annotated[int, Field(ge=0)] = 3
    min_gap: NonNegativeFloat = 0.0
    min_change: NonNegativeFloat = 1e-3
    max_pairs: PositiveInt | None = None

    @model_validator(mode="after")
    def _shares(self) -> "SelectionConfig":
        if self.winners_percent + self.losers_percent > 100:
            raise ValueError(
                f"winners_percent ({self.winners_percent}) and losers_percent "
                f"({self.losers_percent}) must sum to at most 100"
            )
        return self

    def settings(self) -> PairSettings:
        return PairSettings(**asdict(self))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """One round of DPO after each iteration.

    Attributes:
        enabled: false leaves the generator as it is: the control of equal budget.
        steps, epochs: the length of a round, by one of the two.
        reference: "policy" is the generator at the start of the round, "seed" no adapter.
        nll_weight: weight of the likelihood of the winner; 0 as in the paper.
    """

    enabled: bool = True
    beta: PositiveFloat = 0.01
    learning_rate: PositiveFloat = 1e-6
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    batch: PositiveInt = 8
    warmup: Annotated[int, Field(ge=0)] = 0
    rank: PositiveInt = 256
    alpha: PositiveFloat = 256.0
    nll_weight: NonNegativeFloat = 0.0
    reference: Literal["policy", "seed"] = "policy"

    @model_validator(mode="after")
    def _length(self) -> "TrainingConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        return self

    def steps_for(self, pairs: int) -> int:
        """Updates of a round over so many pairs."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # by _length
        return max(1, math.ceil(self.epochs * pairs / self.batch))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaselinesConfig:
    """Human-designed methods, tuned on the development problems.

    Attributes:
        paper, fine: grids: method -> hyperparameter -> values; every combination is scored.
            A method without hyperparameters ({}) is scored once, with its defaults.
    """

    paper: Grid = Field(default_factory=dict)
    fine: Grid = Field(default_factory=dict)

    def combinations(self, grid: Literal["paper", "fine"]) -> list[tuple[str, dict[str, Any]]]:
        """(method, hyperparameters) of each point of a grid, in the order of the file."""
        return [
            (method, dict(zip(axes, values, strict=True)))
            for method, axes in getattr(self, grid).items()
            for values in itertools.product(*axes.values())
        ]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TestConfig:
    """Attributes: top_k: programs, by development score, that are scored on the test problems."""

    __test__ = False  # pytest takes classes named Test… for tests

    top_k: PositiveInt = 15


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """One run of the loop.

    Attributes:
        seed: the model that is to be improved, and that generators have their weights from.
        generator: a PEFT adapter of the seed, as `sdjax train` writes it with `save: adapter`, with
            which the first generator begins; without it that writes as the seed does.
        scope: mlp, attention, all, or glob patterns over tensor paths.
    """

    name: NonEmptyStr
    seed: NonEmptyStr
    generator: NonEmptyStr | None = None
    experts: Annotated[dict[str, ExpertConfig], Field(min_length=1)]
    transfer: dict[str, ExpertConfig] = Field(default_factory=dict)
    scope: NonEmptyStr | Annotated[tuple[NonEmptyStr, ...], Field(min_length=1)] = "mlp"
    iterations: PositiveInt = 3
    task: TaskConfig
    generation: GenerationConfig
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    training: TrainingConfig
    evaluation: DecodingConfig = Field(default_factory=DecodingConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    baselines: BaselinesConfig = Field(default_factory=BaselinesConfig)
    test: TestConfig = Field(default_factory=TestConfig)
    random: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    mesh: MeshConfig = Field(default_factory=MeshConfig)

    @model_validator(mode="after")
    def _slots(self) -> "RunConfig":
        wanted = [f"expert_{n + 1}" for n in range(len(self.experts))]
        for key, experts in (("experts", self.experts), ("transfer", self.transfer)):
            if experts and sorted(experts) != sorted(wanted):
                raise ValueError(
                    f"the slots of {key} must be {', '.join(wanted)}, not {', '.join(experts)}"
                )
        return self

    @property
    def slots(self) -> tuple[str, ...]:
        """expert_1 … expert_k, in the order in which arrays cross jit boundaries."""
        return tuple(f"expert_{n + 1}" for n in range(len(self.experts)))

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible form; `sdjax.search.config_reader.config_from` is the inverse."""
        return asdict(self)


def method_candidate(method: str, hyperparameters: Mapping[str, Any]) -> str:
    """The candidate's name of a human-designed method: "method:ties(density=0.4,scale=0.6)"."""
    inside = ",".join(f"{name}={value}" for name, value in sorted(hyperparameters.items()))
    return f"method:{method}({inside})"
