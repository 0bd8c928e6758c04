"""Examples of different lengths side by side in rows of one length.

Axes: N rows, T tokens, K of them predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A text to learn: the model is trained on `target`, behind `prompt`."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def trained_alone(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of weights [N, T], which of the tokens are predicted at all, so that no other is computed.

    Returns:
        `at` [N, K] int32, the places of the states before the tokens of weight, and their weights
        [N, K] float32; K is the most that a row has, in multiples of 16, and the rest has weight 0.
    """
    after = weights[:, 1:]
    most = min(-(-int((after > 0).sum(1).max()) // 16) * 16, after.shape[1])
    at = np.argsort(after == 0, axis=1, kind="stable")[:, :most].astype(np.int32)
    return at, np.take_along_axis(after, at, axis=1)


def behind_prefix(
    prompt: Sequence[int], targets: Sequence[Sequence[int]], length: int
) -> dict[str, np.ndarray]:
    """Targets [N] that share one prompt, each a row, whose prompt is computed once for all.

    Returns:
        `prefix`, all but the last token of the prompt; `tokens` and `positions` [N, length] int32,
        which begin with that last one; `weights` [N, length] float32: 1 on the targets.
    """
    tokens = np.zeros((len(targets), length), np.int32)
    weights = np.zeros((len(targets), length), np.float32)
    tokens[:, 0] = prompt[-1]
    for row, target in enumerate(targets):
        tokens[row, 1 : len(target) + 1] = target
        weights[row, 1 : len(target) + 1] = 1.0
    prefix = np.array(prompt[:-1], np.int32)
    positions = np.broadcast_to(len(prefix) + np.arange(length, dtype=np.int32), tokens.shape)
    return {"prefix": prefix, "tokens": tokens, "positions": positions, "weights": weights}


def pack(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    """Packs examples into rows, each into the first row with room (first fit, in order).

    Args:
        examples: none longer than `length`.
        length: T.

    Returns:
        `tokens`, `positions`, `segments` [N, T] int32 (segment 0 is padding) and `weights`
        [N, T] float32: 1 on the tokens that are trained.

    Raises:
        ValueError: an example is longer than a row.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    # Rows that can no longer take the shortest example are not looked at again.
    shortest = min(map(len, examples), default=0)
    open_rows: list[int] = []
    for example in examples:
        if len(example) > length:
            raise ValueError(f"an example of {len(example)} tokens in rows of {length}")
        row = next((row for row in open_rows if room[row] >= len(example)), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
            open_rows.append(row)
        rows[row].append(example)
        room[row] -= len(example)
        if room[row] < shortest:
            open_rows.remove(row)
    arrays = {
        name: np.zeros((len(rows), length), np.int32)
        for name in ("tokens", "positions", "segments")
    }
    arrays["weights"] = np.zeros((len(rows), length), np.float32)
    for index, row_examples in enumerate(rows):
        start = 0
        for number, example in enumerate(row_examples, start=1):
            end = start + len(example)
            arrays["tokens"][index, start:end] = example.prompt + example.target
            arrays["positions"][index, start:end] = np.arange(len(example))
            arrays["segments"][index, start:end] = number
            arrays["weights"][index, start + len(example.prompt) : end] = 1.0
            start = end
    return arrays
