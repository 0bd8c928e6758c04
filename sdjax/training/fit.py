"""Gradient descent on a loss over batches: the one loop behind every kind of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from sdjax.errors import UserError
from sdjax.sharding.rules import replicated

# (trainable, frozen, batch) -> (loss, metrics)
Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """AdamW (Loshchilov & Hutter 2019) under a linear warm-up and a cosine decay.

    Attributes:
        learning_rate: the peak.
        steps: the length of the schedule.
        warmup: steps from zero to the peak.
        final: the share of the peak that is left at the end.
        clip: the largest global norm of a gradient.
    """

    learning_rate: float
    steps: int
    warmup: int = 0
    final: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0

    def build(self) -> optax.GradientTransformation:
        decay = optax.cosine_decay_schedule(
            self.learning_rate, max(self.steps - self.warmup, 1), alpha=self.final
        )
        ramp = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup, 1))
        schedule = optax.join_schedules([ramp, decay], [self.warmup])
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                schedule, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay
            ),
        )


def compile_step(
    loss: Loss, optimiser: OptimiserSettings, *, out_shardings: Any = None
) -> tuple[Callable[[Any], Any], Callable[[Any, Any, Any, Any], tuple[Any, Any, dict]]]:
    """The start and the step of a training, for loops that decide along the way.

    Args:
        out_shardings: of what the step returns; left to the compiler by default.

    Returns:
        `start(trainable) -> state` and the compiled
        `step(trainable, state, frozen, batch) -> (trainable, state, metrics)`.
    """
    transformation = optimiser.build()

    @partial(jax.jit, out_shardings=out_shardings)
    def step(trainable, state, frozen, batch):
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch
        )
        updates, state = transformation.update(gradient, state, trainable)
        metrics = metrics | {"loss": value, "gradient_norm": optax.tree.norm(gradient)}
        return optax.apply_updates(trainable, updates), state, metrics

    return transformation.init, step


def fit(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batches: Iterable[Any],
    optimiser: OptimiserSettings,
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains `trainable` by one step a batch.

    Args:
        loss: the scalar to minimise, and metrics beside it.
        trainable: a pytree of float32 arrays; left as it is.
        frozen: a pytree that the loss may read.
        batches: pytrees of one shape.
        optimiser: the update rule.
        on_step: called with the number of finished steps and their metrics.

    Returns:
        the trained pytree and the metrics of every step, `loss` and `gradient_norm` among them.

    Raises:
        UserError: the loss is not finite; it names the step.
    """
    state = optimiser.build().init(trainable)
    pinned = (_shardings(trainable), _shardings(state), replicated(trainable))
    _, step = compile_step(loss, optimiser, out_shardings=pinned)
    history: list[dict[str, float]] = []
    for index, batch in enumerate(batches):
        trainable, state, metrics = step(trainable, state, frozen, batch)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not jnp.isfinite(values["loss"]):
            raise UserError(
                f"training: the loss of step {index + 1} is {values['loss']}; "
                "lower training.learning_rate"
            )
        history.append(values)
        if on_step is not None:
            on_step(index + 1, values)
    return trainable, history


def _shardings(tree: Any) -> Any:
    """Those of the leaves that are on a mesh, to which the next step's are pinned."""

    def one(leaf: jax.Array) -> NamedSharding | None:
        return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None

    return jax.tree.map(one, tree)
