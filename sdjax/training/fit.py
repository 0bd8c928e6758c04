"""Gradient descent on a loss over batches: the one loop behind every kind of training."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.core.errors import UserError
from sdjax.models.transformer import RESIDUAL
from sdjax.sharding.rules import replicated

# Over which a batch's rows are spread.
_ROW_AXES = ("data", "fsdp")

# (trainable, frozen, batch) -> (loss, metrics)
Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """AdamW (Loshchilov & Hutter 2019) under a linear warm-up and a cosine decay.

    Attributes:
        learning_rate: the peak.
        steps: updates; the length of the schedule.
        warmup: steps from zero to the peak.
        final: the share of the peak that is left at the end.
        weight_decay: of what `decayed` tells.
        clip: the largest global norm of a gradient.
        accumulate: batches whose mean gradient makes an update.
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
    accumulate: int = 1

    def build(self) -> optax.GradientTransformation:
        decay = optax.cosine_decay_schedule(
            self.learning_rate, max(self.steps - self.warmup, 1), alpha=self.final
        )
        ramp = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup, 1))
        schedule = optax.join_schedules([ramp, decay], [self.warmup])
        update = optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                schedule,
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decayed,
            ),
        )
        if self.accumulate == 1:
            return update
        return optax.MultiSteps(update, every_k_schedule=self.accumulate).gradient_transformation()


def decayed(trainable: Any) -> Any:
    """Which leaves weight decay is for: matrices; norms and biases keep their size.

    These are the groups of transformers' Trainer, for every family that sdjax has.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, trainable)


def rematerialised(loss: Loss) -> Loss:
    """The same loss in less memory: kept are the hidden states between layers, and what is within
    a layer is computed again in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""
    return jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(RESIDUAL))


class Checkpoints(Protocol):
    """Where a training leaves its state, and finds it again: `sdjax.training.checkpoints`."""

    def restore(self, trainable: Any, state: Any) -> tuple[int, Any, Any]:
        """The finished steps, what is trained and the optimiser's state; as given where none is."""

    def save(self, step: int, trainable: Any, state: Any) -> None:
        """Keeps the state after a step, if that is one to keep."""

    def forget(self, step: int) -> int:
        """Gives up the state after a step; the newest step that is still kept, or 0."""


def compile_step(
    loss: Loss, optimiser: OptimiserSettings, *, out_shardings: Any = None
) -> tuple[Callable[[Any], Any], Callable[[Any, Any, Any, Any], tuple[Any, Any, dict]]]:
    """The start and the step of a training, for loops that decide along the way.

    Args:
        out_shardings: of what the step returns; left to the compiler by default.

    Returns:
        `start(trainable) -> state` and the compiled
        `step(trainable, state, frozen, batch) -> (trainable, state, metrics)`, which consumes the
        first two.
    """
    transformation = optimiser.build()

    @partial(jax.jit, out_shardings=out_shardings, donate_argnums=(0, 1))
    def step(trainable, state, frozen, batch):
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch
        )
        updates, state = transformation.update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        norms = {"gradient_norm": gradient, "weight_norm": trainable}
        metrics |= {"loss": value} | {name: optax.tree.norm(tree) for name, tree in norms.items()}
        return trainable, state, metrics

    return transformation.init, step


def fit(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batches: Iterable[Any],
    optimiser: OptimiserSettings,
    *,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains `trainable` by `optimiser.accumulate` batches a step.

    Args:
        loss: the scalar to minimise, and metrics beside it.
        trainable: a pytree of float32 arrays; consumed.
        frozen: a pytree that the loss may read.
        batches: pytrees of one shape, the same ones each time a training is begun: those of the
            steps that a checkpoint has are passed over.
        optimiser: the update rule.
        on_step: called with the number of finished steps and the means of their metrics.
        checkpoints: by default nothing is kept.

    Returns:
        the trained pytree and the metrics of every step that was done here, `loss`,
        `gradient_norm` and `weight_norm` (after the step) among them.

    Raises:
        UserError: the loss, the gradient or what it makes of the weights is not finite, or too
            large to be squared; it names the step.
    """
    done, state = 0, optimiser.build().init(trainable)
    if checkpoints is not None:
        done, trainable, state = checkpoints.restore(trainable, state)
    pinned = (_shardings(trainable), _shardings(state), replicated(trainable))
    _, step = compile_step(loss, optimiser, out_shardings=pinned)
    history: list[dict[str, float]] = []
    left = itertools.islice(batches, done * optimiser.accumulate, None)
    for number in itertools.count(done + 1):
        parts = []
        for batch in itertools.islice(left, optimiser.accumulate):
            batch = _spread(batch, trainable)
            trainable, state, metrics = step(trainable, state, frozen, batch)
            parts.append(jax.device_get(metrics))
        if not parts:
            return trainable, history
        values = {name: float(sum(part[name] for part in parts)) / len(parts) for name in parts[0]}
        if (fault := _fault(values)) is not None:
            what, made_before = fault
            kept = 0 if checkpoints is None else checkpoints.forget(number - made_before)
            again = f"it then goes on from the checkpoint of step {kept}" if kept else "begin anew"
            raise UserError(
                f"training: {what} at step {number}; lower learning_rate or clip, {again}"
            )
        history.append(values)
        if on_step is not None:
            on_step(number, values)
        if checkpoints is not None:
            checkpoints.save(number, trainable, state)
    raise AssertionError("unreachable")


def _fault(metrics: Mapping[str, float]) -> tuple[str, int] | None:
    """What is not finite in a step, and how many steps before it the weights were made so."""
    for name, what, made_before in (
        ("loss", "loss", 1),
        ("gradient_norm", "gradient's norm", 1),
        ("weight_norm", "trained weights' norm", 0),
    ):
        if not math.isfinite(metrics[name]):
            return f"the {what} is {metrics[name]}", made_before
    return None


def parts_of(trainable: Any, rows: int) -> int:
    """In how many parts `fit` divides a batch of so many rows over the mesh of what is trained."""
    everywhere = replicated(trainable)
    if everywhere is None:
        return 1
    parts = math.prod(everywhere.mesh.shape.get(axis, 1) for axis in _ROW_AXES)
    return parts if rows % parts == 0 else 1


def _spread(batch: Any, trainable: Any) -> Any:
    """The batch on the mesh of what is trained: its rows over all that is not `tensor`."""
    everywhere = replicated(trainable)
    if everywhere is None:
        return batch
    mesh = everywhere.mesh
    axes = tuple(axis for axis in _ROW_AXES if axis in mesh.shape)

    def one(array: np.ndarray) -> jax.Array:
        split = axes if parts_of(trainable, len(array)) > 1 else ()
        place = NamedSharding(mesh, PartitionSpec(split))
        return jax.make_array_from_callback(array.shape, place, np.asarray(array).__getitem__)

    return jax.tree.map(one, batch)


def _shardings(tree: Any) -> Any:
    """Those of the leaves that are on a mesh, to which the next step's are pinned."""

    def one(leaf: jax.Array) -> NamedSharding | None:
        return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None

    return jax.tree.map(one, tree)
