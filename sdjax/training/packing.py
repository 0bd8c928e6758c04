"""Batches of equal shape from examples: shuffling, packing, and indices of target tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from sdjax.training.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A training example: a tokenized prompt and target; the loss is on the target only."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def shuffled_batches(
    count: int, *, batch_size: int, num_batches: int, key: jax.Array
) -> Iterator[np.ndarray]:
    """Yield int64 index arrays [batch_size] that visit `count` rows in random order.

    Every epoch visits each row once, in a new order; a batch may span two epochs.

    Args:
        count: number of rows.
        batch_size: indices per batch; may exceed `count`.
        num_batches: number of batches to yield.
        key: PRNG key; equal keys give equal batches.
    """
    epochs = (
        np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), count))
        for epoch in itertools.count()
    )
    order = itertools.chain.from_iterable(epochs)
    for _ in range(num_batches):
        yield np.fromiter(itertools.islice(order, batch_size), np.int64, batch_size)


def bucket_size(size: int) -> int:
    """Return a size rounded up to one of four sizes per power of two, all multiples of 64.

    Rounds of training whose sizes are similar then share a compiled step, and at most a fifth of
    a large size is padding.
    """
    step = max(64, (1 << (size - 1).bit_length()) // 8)
    return -(-size // step) * step


def target_batches(
    data: Mapping[str, np.ndarray], indices: Sequence[np.ndarray], *, parts: int = 1
) -> Iterator[Batch]:
    """Yield batches with indices of their target tokens, so that logits are computed only there.

    All batches have the same shape, so they share one compiled step.

    Args:
        data: arrays [rows, ...], including `weights` [rows, ..., time], which is 0 except on
            targets.
        indices: rows of each batch.
        parts: number of parts into which a batch is divided over the devices.

    Yields:
        the rows of each array; `target_index` [parts, targets] int32, the indices of the states
        that predict the targets of each part after concatenating its rows; and `weights`
        [parts, targets], 0 on padding. The number of targets is the maximum over all parts of all
        batches, rounded up to a bucket size.
    """
    target_counts = (data["weights"][..., 1:] > 0).reshape(len(data["weights"]), -1).sum(1)
    largest = max(target_counts[rows].reshape(parts, -1).sum(1).max() for rows in indices)
    width = bucket_size(int(largest))
    for rows in indices:
        batch = {name: array[rows] for name, array in data.items()}
        next_weights = np.zeros_like(batch["weights"])
        next_weights[..., :-1] = batch["weights"][..., 1:]
        next_weights = next_weights.reshape(parts, -1)
        index = np.argsort(next_weights == 0, axis=1, kind="stable")[:, :width].astype(np.int32)
        weights = np.take_along_axis(next_weights, index, axis=1)
        yield batch | {"target_index": index, "weights": weights}


def prefix_batch(prompt: Sequence[int], targets: Sequence[Sequence[int]], length: int) -> Batch:
    """Return a batch of targets that share one prompt, whose keys and values are computed once.

    Args:
        prompt: tokens that precede every target.
        targets: tokens of each row.
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
        examples: examples of at most `length` tokens.
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
    """Yield, for each size in turn, the first row with enough room (sizes are <= `capacity`).

    `room` is a segment tree: room[n] is the largest free room in the subtree of node n, whose
    children are 2n and 2n + 1. The second half of the array holds the rows.
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
