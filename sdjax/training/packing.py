"""Examples as batches of equal shape: shuffling, packing, and the places of target tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from sdjax.training.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """Tokens of one text; the loss is on `target`, which follows `prompt`."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def shuffled_batches(
    count: int, *, batch_size: int, num_batches: int, key: jax.Array
) -> Iterator[np.ndarray]:
    """Yield int64 index arrays [batch_size] that go through `count` rows in random order.

    Every row comes once per epoch, each epoch in a new order; a batch may span two epochs.

    Args:
        count: number of rows.
        batch_size: indices per batch; may exceed `count`.
        num_batches: number of batches to yield.
        key: random key; equal keys give equal batches.
    """
    epochs = (
        np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), count))
        for epoch in itertools.count()
    )
    order = itertools.chain.from_iterable(epochs)
    for _ in range(num_batches):
        yield np.fromiter(itertools.islice(order, batch_size), np.int64, batch_size)


def target_batches(
    data: Mapping[str, np.ndarray], indices: Sequence[np.ndarray], *, parts: int = 1
) -> Iterator[Batch]:
    """Yield batches of rows with the places of their target tokens, so that only these get logits.

    All batches have the same shape, so one compiled step serves them all.

    Args:
        data: arrays [rows, ...], among them `weights` [rows, ..., time], 0 except on targets.
        indices: rows of each batch.
        parts: number of parts that a batch is divided into over the devices.

    Yields:
        the rows of each array; `target_index` [parts, targets] int32, the places of the states
        that predict the targets of each part after concatenating its rows; and `weights`
        [parts, targets], 0 on padding. The number of targets is the largest of any part of any
        batch, rounded up to a multiple of 64.
    """
    target_counts = (data["weights"][..., 1:] > 0).reshape(len(data["weights"]), -1).sum(1)
    largest = max(target_counts[rows].reshape(parts, -1).sum(1).max() for rows in indices)
    width = -(-int(largest) // 64) * 64
    for rows in indices:
        batch = {name: array[rows] for name, array in data.items()}
        next_weights = np.zeros_like(batch["weights"])
        next_weights[..., :-1] = batch["weights"][..., 1:]
        next_weights = next_weights.reshape(parts, -1)
        index = np.argsort(next_weights == 0, axis=1, kind="stable")[:, :width].astype(np.int32)
        weights = np.take_along_axis(next_weights, index, axis=1)
        yield batch | {"target_index": index, "weights": weights}


def prefix_batch(prompt: Sequence[int], targets: Sequence[Sequence[int]], length: int) -> Batch:
    """Return a batch of targets that share one prompt, which is computed only once.

    Args:
        prompt: tokens that precede every target.
        targets: one row each.
        length: tokens per row.

    Returns:
        `prefix`, all tokens of the prompt but the last; `tokens` and `positions` [rows, length]
        int32, which start with that last token; `weights` [rows, length] float32, 1 on targets.
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
    """Pack examples into rows, each into the first row with enough room (first fit, in order).

    Args:
        examples: none longer than `length`.
        length: tokens per row.

    Returns:
        `tokens`, `positions` and `segments` [rows, length] int32 (segment 0 is padding), and
        `weights` [rows, length] float32, 1 on targets.

    Raises:
        ValueError: an example is longer than a row.
    """
    sizes = [len(example) for example in examples]
    if max(sizes, default=0) > length:
        raise ValueError(f"an example of {max(sizes)} tokens does not fit into rows of {length}")
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
    """Yield the first row with room for each size in turn, all sizes at most `capacity`.

    A binary tree holds the largest free room below each node: room[1] of all rows, room[n] of the
    rows below 2n and 2n + 1; the second half holds the rows themselves.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()  # at most one row per size
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
