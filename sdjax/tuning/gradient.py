"""Search by gradient: Adam on values scaled by their bounds, with early stopping on development.

Axes: parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import optax

from sdjax.tuning.search import Box, Evaluations, SearchConfig
from sdjax.tuning.trace import Trace
from sdjax.tuning.types import Tunable

# (values [parameters], start, step) -> loss and gradient [parameters], which may not be finite
LossAndGradient = Callable[[np.ndarray, int, int], tuple[float, np.ndarray]]

# Steps with a gradient that is not finite, in a row, that end a start.
_MAX_DROPPED = 3
# Learning rate of the last step, relative to the first; small, since batches are noisy.
_FINAL_RATE = 0.1


def search_by_gradient(
    tunable: Tunable,
    loss_and_gradient: LossAndGradient,
    evaluations: Evaluations,
    config: SearchConfig,
    trace: Trace,
    *,
    on_step: Callable[[int, int, dict[str, Any]], None] = lambda start, step, event: None,
) -> None:
    """Minimize the loss on training problems (Adam, Kingma and Ba 2015, arXiv 1412.6980).

    Each start evaluates its initial values, those after every few steps and the last ones, on
    development problems. It ends early if they stop improving. A step whose gradient is not finite
    is dropped; three in a row end the start.

    Args:
        tunable: what is tuned.
        loss_and_gradient: loss on a batch of training problems.
        evaluations: the development evaluations, whose `best` is the result.
        config: settings of the search.
        trace: records the steps.
        on_step: called after each step with (start, step from 1, event).
    """
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=_FINAL_RATE)
    box, adam = Box(tunable), optax.adam(schedule)
    for start in range(config.starts):
        scaled = box.initial(start, config.seed)
        state = adam.init(scaled.astype(np.float32))
        due = _evaluated_steps(config, start)
        best, stale, dropped = -math.inf, 0, 0
        for step in range(config.steps + 1):
            values = box.values(scaled)
            # A start that ends early has an evaluation of its last values, even if it has no other.
            if step in due or (dropped == _MAX_DROPPED and best == -math.inf):
                score = evaluations(values, start=start, step=step)
                best, stale = (score, 0) if score > best else (best, stale + 1)
            if step == config.steps or stale >= config.patience or dropped == _MAX_DROPPED:
                break
            event = trace.record(
                {"event": "step", "start": start, "step": step, "values": values.tolist()},
                partial(_step, loss_and_gradient, values, start, step),
            )
            on_step(start, step + 1, event)
            if event["gradient"] is None:
                dropped += 1
                continue
            dropped = 0
            gradient = np.asarray(event["gradient"] * box.width, np.float32)
            updates, state = adam.update(gradient, state)
            scaled = np.clip(scaled + np.asarray(updates, np.float64), 0.0, 1.0)


def _evaluated_steps(config: SearchConfig, start: int) -> set[int]:
    """Return the steps before which a start is evaluated, as many as its budget allows."""
    share = config.share(start)
    if share == 1:
        return {config.steps}
    every = max(config.evaluate_every, math.ceil(config.steps / (share - 1)))
    return {*range(0, config.steps, every), config.steps}


def _step(
    loss_and_gradient: LossAndGradient, values: np.ndarray, start: int, step: int
) -> dict[str, Any]:
    loss, gradient = loss_and_gradient(values, start, step)
    if not (math.isfinite(loss) and np.all(np.isfinite(gradient))):
        return {"loss": None, "gradient": None}
    return {"loss": float(loss), "gradient": np.asarray(gradient, np.float64).tolist()}
