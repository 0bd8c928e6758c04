"""Training config schema: a job's YAML file, and the `training:` section of a run's config."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import (
    STRICT,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from sdjax.core.errors import closest_name
from sdjax.models.lora import ALL_PROJECTIONS
from sdjax.sharding.config import MeshConfig
from sdjax.training.losses import LOSSES, SMOOTHED_LOSSES


def _one_of(names: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            similar = closest_name(name, names)
            hint = "" if similar is None else f"; did you mean {similar}?"
            raise ValueError(f"must be one of {', '.join(names)}, not {name}{hint}")
        return name

    return AfterValidator(check)


_DPOConfig = TypeVar("_DPOConfig", bound="DPOConfig")

_CLIP_RANGE = 0.2
# The order of all batches is planned before the first step, so the number of steps is bounded.
StepCount = Annotated[int, Field(ge=1, le=1_000_000)]
Projection = Annotated[str, _one_of(ALL_PROJECTIONS)]
LossName = Annotated[str, _one_of(LOSSES)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warmup and cosine decay.

    Attributes:
        learning_rate: peak learning rate.
        max_steps: number of updates, and length of the learning rate schedule.
        warmup_steps: number of updates over which the learning rate rises from zero to its peak.
        min_lr_ratio: final learning rate as a fraction of the peak; 1 keeps it constant.
        weight_decay: applied to matrices only; see `weight_decay_mask`.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        eps: added to the denominator of the update.
        max_grad_norm: gradients are clipped to this global norm.
        gradient_accumulation_steps: number of batches whose gradients are averaged per update.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = {
        "steps": "max_steps",
        "warmup": "warmup_steps",
        "final": "min_lr_ratio",
        "clip": "max_grad_norm",
        "accumulate": "gradient_accumulation_steps",
    }

    learning_rate: PositiveFloat = 1e-4
    max_steps: StepCount | None
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    b1: NonNegativeFloat = 0.9
    b2: NonNegativeFloat = 0.999
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    gradient_accumulation_steps: PositiveInt = 1

    @model_validator(mode="after")
    def _check_warmup(self) -> OptimizerConfig:
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} exceeds max_steps, {self.max_steps}"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Number of updates; `max_steps` must be set."""
        assert self.max_steps is not None
        return self.max_steps

    @property
    def num_batches(self) -> int:
        """Total number of batches consumed by all updates."""
        return self.num_steps * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPOConfig(OptimizerConfig):
    """Config of one round of DPO.

    Attributes:
        loss: sigmoid (DPO), ipo, robust (to pairs whose sides are swapped) or forward_kl (keeps
            what the reference can write); see `sdjax.training.losses`.
        beta: strength of the pull toward the reference model.
        label_smoothing: probability that the sides of a pair are swapped, for `loss: robust`.
        nll_weight: weight of the mean negative log-likelihood of the chosen completion (RPO, Pang
            et al. 2024, arXiv 2404.19733). Without it, small generators forget how to write
            programs.
        reference: "policy" is the model at the start of the round; "seed" is the model without its
            adapter.
        max_steps: number of updates; set either this or `epochs`.
        epochs: passes over the pairs.
        batch_size: pairs per batch.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = OptimizerConfig.RENAMED_KEYS | {"batch": "batch_size"}

    loss: LossName = "sigmoid"
    beta: PositiveFloat = 0.01
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    nll_weight: NonNegativeFloat = 0.0
    reference: Literal["policy", "seed"] = "policy"
    learning_rate: PositiveFloat = 1e-6
    max_steps: StepCount | None = None
    epochs: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _check_length(self) -> DPOConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of max_steps and epochs")
        return self

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> DPOConfig:
        if self.loss in SMOOTHED_LOSSES and self.label_smoothing is None:
            raise ValueError(
                f"loss: {self.loss} needs label_smoothing, the probability that the sides of a "
                "pair are swapped, such as 0.1"
            )
        if self.loss not in SMOOTHED_LOSSES and self.label_smoothing is not None:
            raise ValueError(
                f"label_smoothing: loss: {self.loss} does not use it; set it to null, or "
                f"set loss: {SMOOTHED_LOSSES[0]}"
            )
        return self

    def for_count(self: _DPOConfig, count: int) -> _DPOConfig:
        """Return the config for `count` examples, with `epochs` converted to `max_steps`."""
        if self.epochs is None:
            return self
        batch = self.batch_size * self.gradient_accumulation_steps
        steps = max(1, math.ceil(self.epochs * count / batch))
        config = copy.copy(self)  # `replace` would validate defaults as if the user had set them
        object.__setattr__(config, "max_steps", steps)
        object.__setattr__(config, "epochs", None)
        return config


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunTrainingConfig(DPOConfig):
    """The `training:` section of a run.

    Attributes:
        enabled: False leaves the generator unchanged, as a control with equal budget.
        objective: "pairs" trains on preference pairs by `loss`. "entropic" trains on the samples of
            the iteration by policy gradient, with the advantages of TTT-Discover
            (`sdjax.training.advantages`) within one prompt or the iteration
            (`selection.within_prompt`); `beta` is then the weight of the KL divergence to
            `reference`, and there are `batch_size` samples per batch.
        clip_range: for `objective: entropic`, the ratio of a token's probabilities after and before
            a round is clipped to 1 plus or minus this (PPO).
        start: generator that a round starts from: "current", which wrote the samples, or "first",
            the run's first one, as in EvoTune (with `selection.iterations: all`).
        after_last: whether the generator is also trained after the last iteration, though no
            iteration samples from it then.
        rank: rank of the LoRA adapter.
        alpha: LoRA scaling; updates are scaled by alpha / rank.
    """

    enabled: bool = True
    objective: Literal["pairs", "entropic"] = "pairs"
    clip_range: Annotated[float, Field(gt=0, lt=1)] = _CLIP_RANGE
    start: Literal["current", "first"] = "current"
    after_last: bool = False
    rank: PositiveInt = 256
    alpha: PositiveFloat = 256.0

    @model_validator(mode="after")
    def _check_objective(self) -> RunTrainingConfig:
        if self.objective == "pairs":
            if self.clip_range != _CLIP_RANGE:
                raise ValueError(
                    f"clip_range: objective: pairs does not use it; set it to {_CLIP_RANGE}, the "
                    "default, or set objective: entropic"
                )
            return self
        unused = {"loss": (self.loss, "sigmoid"), "nll_weight": (self.nll_weight, 0)}
        for key, (value, default) in unused.items():
            if value != default:
                raise ValueError(
                    f"{key}: objective: entropic has no pairs; set training.{key} to {default}"
                )
        if self.start == "first":
            raise ValueError(
                "start: objective: entropic learns from what the current generator wrote; "
                "set start: current"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingJob(OptimizerConfig):
    """Config keys common to all training jobs.

    Attributes:
        model: a folder, a name on Hugging Face, or zoo:NAME; with +ADAPTER, a PEFT adapter is
            merged into it first.
        out: the folder to write, which must not exist.
        save: "model" writes all weights, with the adapter merged into them; "adapter" writes a
            PEFT adapter.
        adapter: PEFT adapter to start from instead of a new one; it has its own rank, alpha and
            target modules.
        rank: rank of a new LoRA adapter; only the adapter is trained. null trains all weights.
        alpha: LoRA scaling of a new adapter; updates are scaled by alpha / rank.
        target_modules: projections that a new adapter applies to, such as [attn.q_proj]; all by
            default.
        compute_dtype: dtype of weights and activations; trained parameters are kept in float32.
        remat: recompute activations in the backward pass to save memory.
        mesh: number of devices along each axis of the mesh.
        checkpoint_every: steps between checkpoints.
        rng_seed: seed for initializing a new adapter and for shuffling the data.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = OptimizerConfig.RENAMED_KEYS | {
        "projections": "target_modules",
        "compute": "compute_dtype",
        "random": "rng_seed",
    }

    model: NonEmptyStr
    out: NonEmptyStr
    save: Literal["model", "adapter"] = "model"
    adapter: str | None = None
    rank: PositiveInt | None = None
    alpha: PositiveFloat = 32.0
    target_modules: Annotated[tuple[Projection, ...], Field(min_length=1)] = ALL_PROJECTIONS
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    checkpoint_every: PositiveInt = 100
    rng_seed: NonNegativeInt = 0

    @field_validator("rank", "alpha", "target_modules")
    @classmethod
    def _check_new_adapter(cls, value: Any, info: Any) -> Any:
        """Reject explicit settings of a new adapter (validators are not called for defaults)."""
        if value is not None and info.data.get("adapter") is not None:
            raise ValueError("set by the adapter to start from; remove the key")
        return value

    @model_validator(mode="after")
    def _check_save(self) -> TrainingJob:
        if self.save == "adapter" and self.rank is None and self.adapter is None:
            raise ValueError("save: adapter requires rank, or an adapter to start from")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SFTJob(TrainingJob):
    """Config of supervised fine-tuning on rows with prompt and completion, or with messages.

    Attributes:
        data: a JSONL file, next to the config or in the working directory; or datasets:NAME.
        split: split of a dataset of the `datasets` library.
        max_length: tokens per packed row; longer prompts, and prompts beyond the model's maximum
            sequence length, are truncated from the left.
        batch_size: packed rows per batch.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = TrainingJob.RENAMED_KEYS | {
        "length": "max_length",
        "rows": "batch_size",
    }

    max_steps: StepCount
    data: NonEmptyStr
    split: str = "train"
    max_length: PositiveInt = 128
    batch_size: PositiveInt = 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPOJob(DPOConfig, TrainingJob):
    """Config of preference training on rows with prompt, chosen and rejected.

    Attributes:
        data: a JSONL file or the folder of a run, next to the config or in the working directory;
            or datasets:NAME.
        split: split of a dataset of the `datasets` library.
        max_length: maximum tokens of prompt plus completion; longer prompts are truncated from the
            left. Defaults to the model's maximum sequence length.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = (
        TrainingJob.RENAMED_KEYS | DPOConfig.RENAMED_KEYS | {"length": "max_length"}
    )

    data: NonEmptyStr
    split: str = "train"
    max_length: PositiveInt | None = None
    max_steps: StepCount | None = None
    learning_rate: PositiveFloat = 1e-5
    beta: PositiveFloat = 0.1
    batch_size: PositiveInt = 4
    rank: PositiveInt | None = 16

    @model_validator(mode="after")
    def _check_reference(self) -> DPOJob:
        if self.reference == "seed" and self.rank is None and self.adapter is None:
            raise ValueError("reference: seed requires an adapter; use reference: policy")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmstartJob(TrainingJob):
    """Config of supervised fine-tuning on candidates sampled from the grammar.

    Attributes:
        experts: one-line description of each expert of the planned search.
        prompt: prompt that the search will use: "full", "short" or a text file.
        programs: number of distinct candidates to sample for training.
        batch_size: candidates per batch.
        scope: tensors to merge, as in the config of the search. If the two differ, reports cannot
            show which candidates the generator memorized.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = TrainingJob.RENAMED_KEYS | {"batch": "batch_size"}

    max_steps: StepCount
    experts: Annotated[tuple[str, ...], Field(min_length=2, max_length=5)]
    prompt: str = "full"
    programs: Annotated[int, Field(ge=1, le=1_000_000)] = 3000
    batch_size: PositiveInt = 16
    scope: str | Annotated[tuple[str, ...], Field(min_length=1)] = "mlp"
    learning_rate: PositiveFloat = 1e-3
    rank: PositiveInt | None = 32


JOBS: dict[str, type[TrainingJob]] = {"sft": SFTJob, "dpo": DPOJob, "warmstart": WarmstartJob}
