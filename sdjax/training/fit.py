"""The training loop shared by every kind of training."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.models.transformer import RESIDUAL
from sdjax.sharding.rules import replicated
from sdjax.training.config import OptimizerConfig
from sdjax.training.jit_cache import JitCache
from sdjax.training.types import Batch, LossFn, Metrics, OnStep

# Mesh axes over which the rows of a batch are sharded.
_ROW_AXES = ("data", "fsdp")

# Metrics on the progress bar, with their labels.
_SHOWN_METRICS = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


@runtime_checkable
class Checkpoints(Protocol):
    """Storage for the training state; see `sdjax.training.checkpoints`."""

    def restore(self, trainable: Any, opt_state: Any) -> tuple[int, Any, Any]:
        """Return (finished steps, trainable, optimizer state), or 0 and the arguments."""

    def save(self, step: int, trainable: Any, opt_state: Any, *, last: bool) -> None:
        """Store the state if a checkpoint is due at this step, or if the step is the last one."""

    def discard(self, step: int) -> int:
        """Remove the checkpoint of a step; return the newest remaining step, or 0."""


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Return a schedule with linear warmup to the peak and cosine decay to `min_lr_ratio` of it."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(config.num_steps - config.warmup_steps, 1),
        alpha=config.min_lr_ratio,
    )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return AdamW with clipping, weight decay on matrices, and gradient accumulation."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=weight_decay_mask,
        ),
    )
    if config.gradient_accumulation_steps == 1:
        return optimizer
    return optax.MultiSteps(
        optimizer, every_k_schedule=config.gradient_accumulation_steps
    ).gradient_transformation()


def weight_decay_mask(trainable: Any) -> Any:
    """Return the weight-decay mask: matrices only, not norms or biases (as in HF's Trainer)."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, trainable)


def rematerialize(loss: LossFn) -> LossFn:
    """Return the loss with activation checkpointing: only hidden states between layers are stored.

    The backward pass recomputes everything within a layer (Chen et al. 2016, arXiv 1604.06174).
    """
    return _Rematerialized(loss=loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rematerialized:
    loss: LossFn

    def __call__(self, trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        policy = jax.checkpoint_policies.save_only_these_names(RESIDUAL)
        return jax.checkpoint(self.loss, policy=policy)(trainable, frozen, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainStep:
    """Gradient and update of one batch; equal if the loss and the update rule are.

    Attributes:
        loss: maps (trainable, frozen, batch) to a scalar and metrics.
        config: the update rule.
    """

    loss: LossFn
    config: OptimizerConfig

    def __call__(
        self, trainable: Any, opt_state: Any, frozen: Any, batch: Batch
    ) -> tuple[Any, Any, Metrics]:
        gradient_of = jax.value_and_grad(self.loss, has_aux=True)
        (value, metrics), gradient = gradient_of(trainable, frozen, batch)
        updates, opt_state = make_optimizer(self.config).update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        metrics |= {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "param_norm": optax.tree.norm(trainable),
        }
        return trainable, opt_state, metrics


def compile_step(
    loss: LossFn,
    config: OptimizerConfig,
    *,
    out_shardings: Any = None,
    jit_cache: JitCache | None = None,
) -> tuple[Callable[[Any], Any], Callable[[Any, Any, Any, Batch], tuple[Any, Any, dict]]]:
    """Return the initializer and the jitted step function of a training run.

    Args:
        loss: maps (trainable, frozen, batch) to a scalar and metrics.
        config: the update rule.
        out_shardings: shardings of the step's outputs; by default, the compiler chooses them.
        jit_cache: cache of the step function, if several runs share one; their losses are shared if
            they are equal.

    Returns:
        `init(trainable) -> opt_state`, and
        `step(trainable, opt_state, frozen, batch) -> (trainable, opt_state, metrics)`, which
        donates its first two arguments.
    """
    step = _TrainStep(loss=loss, config=_without_length(config))
    jitted = (jit_cache or JitCache()).jit(step, out_shardings=out_shardings, donate_argnums=(0, 1))
    return make_optimizer(config).init, jitted


def _without_length(config: OptimizerConfig) -> OptimizerConfig:
    """Return the config without its number of steps, if the learning rate does not depend on it."""
    if config.min_lr_ratio != 1:
        return config
    config = copy.copy(config)  # `replace` would validate defaults as if the user had set them
    object.__setattr__(config, "max_steps", max(config.warmup_steps, 1))
    return config


def fit(
    loss: LossFn,
    trainable: Any,
    frozen: Any,
    batches: Iterable[Batch],
    config: OptimizerConfig,
    *,
    title: str = "train",
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    jit_cache: JitCache | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Train until the batches are exhausted.

    Args:
        loss: maps (trainable, frozen, batch) to a scalar and metrics.
        trainable: pytree of float32 arrays; donated.
        frozen: pytree that the loss reads.
        batches: pytrees of equal shapes, `gradient_accumulation_steps` per step. They must be
            deterministic: on resuming, the batches of finished steps are skipped.
        config: the update rule.
        title: text in front of the progress bar.
        on_step: called after each step with its metrics, averaged over its batches.
        checkpoints: storage for the training state; nothing is stored by default.
        jit_cache: cache of the step function, if several trainings share one.

    Returns:
        the trained pytree, and the metrics of each step executed by this call. They include `loss`,
        `learning_rate`, `grad_norm` and `param_norm` (after the update).

    Raises:
        UserError: the loss or the norm of the gradient or of the updated parameters is not finite;
            the message names the step.
    """
    accumulation = config.gradient_accumulation_steps
    schedule = learning_rate_schedule(config)
    done, opt_state = 0, make_optimizer(config).init(trainable)
    if checkpoints is not None:
        done, trainable, opt_state = checkpoints.restore(trainable, opt_state)
    out_shardings = (_shardings(trainable), _shardings(opt_state), replicated(trainable))
    _, step = compile_step(loss, config, out_shardings=out_shardings, jit_cache=jit_cache)
    history: list[dict[str, float]] = []
    remaining = itertools.islice(batches, done * accumulation, None)
    with progress_bar(title, config.num_steps, completed=done) as advance:
        for number in itertools.count(done + 1):
            start, parts = time.perf_counter(), []
            for batch in itertools.islice(remaining, accumulation):
                batch = shard_batch(batch, trainable)
                trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch)
                parts.append(jax.device_get(metrics))
            if not parts:
                return trainable, history
            values = {
                name: float(sum(part[name] for part in parts)) / len(parts) for name in parts[0]
            }
            values["learning_rate"] = float(schedule(number - 1))
            _check_finite(values, number, checkpoints)
            history.append(values)
            if on_step is not None:
                on_step(number, values)
            if checkpoints is not None:
                checkpoints.save(number, trainable, opt_state, last=number == config.num_steps)
            shown = [
                f"{label} {values[name]:.3f}"
                for name, label in _SHOWN_METRICS.items()
                if name in values
            ]
            if "tokens" in values:
                speed = values["tokens"] * len(parts) / (time.perf_counter() - start)
                shown.append(f"{speed:.0f} tokens/s")
            advance(description=f"{title}: {', '.join(shown)}")
    raise AssertionError("unreachable")


def _check_finite(metrics: Mapping[str, float], step: int, checkpoints: Checkpoints | None) -> None:
    """Raise UserError if a step diverged, after discarding the checkpoint that caused it."""
    for name, label, cause in (
        ("loss", "loss", step - 1),
        ("grad_norm", "gradient's norm", step - 1),
        ("param_norm", "trained weights' norm", step),
    ):
        if not math.isfinite(metrics[name]):
            kept = 0 if checkpoints is None else checkpoints.discard(cause)
            restart = (
                f"it then resumes from the checkpoint of step {kept}" if kept else "then start over"
            )
            raise UserError(
                f"training: the {label} is {metrics[name]} at step {step}; lower learning_rate or "
                f"max_grad_norm, {restart}"
            )


def num_parts(trainable: Any, rows: int) -> int:
    """Return the number of parts into which `fit` shards a batch of `rows` rows."""
    sharding = replicated(trainable)
    if sharding is None:
        return 1
    parts = math.prod(sharding.mesh.shape.get(axis, 1) for axis in _ROW_AXES)
    return parts if rows % parts == 0 else 1


def shard_batch(batch: Batch, trainable: Any) -> Batch:
    """Put a batch on the mesh of a tree's arrays, sharding its rows over all axes but `tensor`."""
    sharding = replicated(trainable)
    if sharding is None:
        return batch
    mesh = sharding.mesh
    row_axes = tuple(axis for axis in _ROW_AXES if axis in mesh.shape)

    def shard(array: np.ndarray) -> jax.Array:
        axes = row_axes if num_parts(trainable, len(array)) > 1 else ()
        spec = NamedSharding(mesh, PartitionSpec(axes))
        return jax.make_array_from_callback(array.shape, spec, np.asarray(array).__getitem__)

    return jax.tree.map(shard, batch)


def _shardings(tree: Any) -> Any:
    """Return the leaves' shardings, which are also the output shardings of each step."""

    def sharding(leaf: jax.Array) -> NamedSharding | None:
        return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None

    return jax.tree.map(sharding, tree)
