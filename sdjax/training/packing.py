"""Examples of different lengths side by side in rows of one length.

Axes: N rows, B of them in a batch, T tokens, K that are predicted of a part of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A text to learn: the model is trained on `target`, behind `prompt`."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def batches_of(
    data: Mapping[str, np.ndarray], chosen: Sequence[np.ndarray], *, parts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of rows, with the places of the tokens that are trained, so that no other is
    predicted.

    Args:
        data: arrays [N, ...], among them `weights` [N, ..., T], 0 but for the tokens to train.
        chosen: the rows [B] of each batch.
        parts: in how many a batch is divided over the devices; each part's places are its own.

    Returns:
        the rows of each array, but `weights` [parts, K], and `at` [parts, K] int32: a part's tokens
        laid end to end, the places of the states before those of weight. K is the most that a part
        of any of the batches has, in multiples of 64: one program takes them all. What is left
        over has weight 0.
    """
    trained = (data["weights"][..., 1:] > 0).reshape(len(data["weights"]), -1).sum(1)
    most = max(trained[rows].reshape(parts, -1).sum(1).max() for rows in chosen)
    most = -(-int(most) // 64) * 64
    for rows in chosen:
        batch = {name: array[rows] for name, array in data.items()}
        after = np.zeros_like(batch["weights"])
        after[..., :-1] = batch["weights"][..., 1:]
        after = after.reshape(parts, -1)
        at = np.argsort(after == 0, axis=1, kind="stable")[:, :most].astype(np.int32)
        yield batch | {"at": at, "weights": np.take_along_axis(after, at, axis=1)}


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
    sizes = [len(example) for example in examples]
    if max(sizes, default=0) > length:
        raise ValueError(f"an example of {max(sizes)} tokens in rows of {length}")
    rows: list[list[Example]] = []
    for example, row in zip(examples, _first_fit(sizes, length), strict=True):
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
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


def _first_fit(sizes: Sequence[int], capacity: int) -> Iterator[int]:
    """The first row that has room for each size in turn, all at most `capacity`.

    Found in a binary tree whose nodes know the most room of the rows below them: room[1] of all,
    room[n] of what is below 2n and 2n + 1, the last half of the rows themselves.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()  # a row each, if it comes to that
    room = [capacity] * (2 * leaves)
    for size in sizes:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        yield node - leaves
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
