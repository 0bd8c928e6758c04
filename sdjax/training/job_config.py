"""What a training job is told: the keys of its YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from sdjax.models.lora import ALL_PROJECTIONS
from sdjax.sharding.mesh import MeshConfig
from sdjax.training.fit import OptimiserSettings
from sdjax.training.losses import LOSSES

STRICT = ConfigDict(extra="forbid", strict=True)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _one_of(names: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}, not {name}")
        return name

    return AfterValidator(check)


Projection = Annotated[str, _one_of(ALL_PROJECTIONS)]
LossName = Annotated[str, _one_of(LOSSES)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Job:
    """What every training is told.

    Attributes:
        model: a folder, a name on Hugging Face, or zoo:NAME.
        out: the new folder.
        save: `model` writes a whole model, with the adapter folded in; `adapter` a PEFT adapter.
        steps: updates, each by the mean of `accumulate` batches' gradients, whatever their sizes.
        learning_rate, warmup, final, weight_decay, b1, b2, eps, clip: as in `OptimiserSettings`.
        adapter: a PEFT adapter to start from, in place of a fresh one; it has its own rank, alpha
            and projections.
        rank: of a fresh LoRA adapter, alone trained; null trains all weights.
        projections: which have factors.
        compute: the dtype of weights and activations; what is trained is kept in float32.
        remat: computes activations again in the backward pass, for less memory.
        checkpoint_every: steps.
        random: seeds the adapter and the order of the data.
    """

    model: str
    out: str
    steps: Count
    save: Literal["model", "adapter"] = "model"
    learning_rate: Positive = 1e-4
    warmup: Natural = 0
    final: NotNegative = 1.0
    weight_decay: NotNegative = 0.0
    b1: NotNegative = 0.9
    b2: NotNegative = 0.999
    eps: Positive = 1e-8
    clip: Positive = 1.0
    accumulate: Count = 1
    adapter: str | None = None
    rank: Count | None = None
    alpha: Positive = 32.0
    projections: Annotated[tuple[Projection, ...], Field(min_length=1)] = ALL_PROJECTIONS
    compute: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    checkpoint_every: Count = 100
    random: Natural = 0

    @field_validator("rank", "alpha", "projections")
    @classmethod
    def _is_of_a_fresh_adapter(cls, value: Any, info: ValidationInfo) -> Any:
        """Called with what is given, not with defaults."""
        if value is not None and info.data.get("adapter") is not None:
            raise ValueError("the adapter to start from has its own; remove the key")
        return value

    @model_validator(mode="after")
    def _makes_sense(self):
        if self.save == "adapter" and self.rank is None and self.adapter is None:
            raise ValueError("save: adapter needs a rank, or an adapter to start from")
        if self.warmup > self.steps:
            raise ValueError(f"warmup: {self.warmup} is more than the {self.steps} steps")
        return self

    def optimiser(self) -> OptimiserSettings:
        names = [field.name for field in dataclasses.fields(OptimiserSettings)]
        return OptimiserSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SFTJob(Job):
    """Fine-tunes on rows with prompt and completion, or with messages.

    Attributes:
        data: a JSONL file, or datasets:NAME and its `split`.
        length: tokens of a packed row; a longer prompt, or one beyond the context, is cut from the
            left.
        rows: packed rows a batch.
    """

    data: str
    split: str = "train"
    length: Count = 128
    rows: Count = 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPOJob(Job):
    """Trains on rows with prompt, chosen and rejected.

    Attributes:
        data: a JSONL file, datasets:NAME and its `split`, or the folder of a run.
        length: tokens of a side; longer prompts are cut from the left. The context by default.
        nll_weight: weight of the chosen side's likelihood.
        reference: `policy` is what the training begins with, `seed` the model without `adapter`.
        batch: pairs.
    """

    data: str
    split: str = "train"
    length: Count | None = None
    loss: LossName = "sigmoid"
    beta: Positive = 0.1
    learning_rate: Positive = 1e-5
    nll_weight: NotNegative = 0.0
    batch: Count = 4
    reference: Literal["policy", "seed"] = "policy"
    rank: Count | None = 16

    @model_validator(mode="after")
    def _has_seed(self):
        if self.reference == "seed" and self.rank is None and self.adapter is None:
            raise ValueError("reference: seed is the model without its adapter; there is none")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmstartJob(Job):
    """Teaches a model to write programs in the algorithm API.

    Attributes:
        experts: a line of description each, as in the search to come.
        prompt: the one from which that search will sample.
        programs: how many distinct ones are drawn.
        batch: programs.
        scope: the tensors that the search will merge, as its config has them: over others, reports
            cannot tell which programs are remembered.
    """

    experts: Annotated[tuple[str, ...], Field(min_length=2, max_length=5)]
    prompt: str = "full"
    programs: Count = 3000
    batch: Count = 16
    scope: str | Annotated[tuple[str, ...], Field(min_length=1)] = "mlp"
    learning_rate: Positive = 1e-3
    rank: Count | None = 32


JOBS: dict[str, type[Job]] = {"sft": SFTJob, "dpo": DPOJob, "warmstart": WarmstartJob}
