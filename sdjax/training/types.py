"""Type aliases for training, and the axis names in its jaxtyping annotations.

| axis | size |
|---|---|
| batch | sequences of one batch |
| pairs | preference pairs of one batch; each is two sequences, (chosen, rejected) |
| time | tokens of a sequence |
| parts | parts of a batch, one per group of devices |
| targets | target tokens of each part, padded |
| chunks, chunk | chunks of target tokens, and target tokens of each chunk |
| hidden | width of the residual stream |
| vocab | tokens of the vocabulary |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

# Name to array: "tokens", "weights", and other inputs of a loss.
Batch: TypeAlias = dict[str, Any]

# Scalar JAX arrays of one step.
Metrics: TypeAlias = dict[str, jax.Array]

# (trainable, frozen, batch) -> (loss, metrics)
LossFn: TypeAlias = Callable[[Any, Any, Batch], tuple[jax.Array, Metrics]]

# Called with the number of finished steps and the metrics of the last one.
OnStep: TypeAlias = Callable[[int, dict[str, float]], None]

# (compute, data) -> the result of `compute`, which depends on the arrays of `data`
ArrayCache: TypeAlias = Callable[[Callable[[], np.ndarray], dict[str, np.ndarray]], np.ndarray]
