"""Packing of examples into rows."""

import jax
import numpy as np
import pytest

from sdjax.training.packing import Example, pack, shuffled_batches

EXAMPLES = [
    Example(prompt=(3, 4), target=(5,)),
    Example(prompt=(6,), target=(7, 8, 9)),
    Example(prompt=(), target=(2, 2)),
]


def test_every_token_occurs_once_with_its_position():
    packed = pack(EXAMPLES, 6)
    found = []
    for row in range(len(packed["tokens"])):
        for number in range(1, packed["segments"][row].max() + 1):
            where = packed["segments"][row] == number
            assert packed["positions"][row][where].tolist() == list(range(where.sum()))
            found.append(tuple(packed["tokens"][row][where].tolist()))
    assert sorted(found) == sorted(example.prompt + example.target for example in EXAMPLES)


def test_only_targets_have_weight():
    packed = pack(EXAMPLES, 6)
    trained = packed["tokens"][packed["weights"] == 1].tolist()
    assert sorted(trained) == [2, 2, 5, 7, 8, 9]
    assert np.all(packed["weights"][packed["segments"] == 0] == 0)


def test_rows_are_filled_first_fit():
    assert pack(EXAMPLES, 6)["tokens"].shape == (2, 6)
    assert pack(EXAMPLES, 9)["tokens"].shape == (1, 9)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_each_example_is_in_the_first_row_with_room(count):
    sizes = np.random.default_rng(0).integers(1, 33, count).tolist()
    expected: list[list[int]] = []
    for size in sizes:
        row = next((row for row in expected if sum(row) + size <= 32), None)
        if row is None:
            expected.append([size])
        else:
            row.append(size)
    segments = pack([Example(prompt=(2,) * size, target=()) for size in sizes], 32)["segments"]
    assert [np.bincount(row)[1:].tolist() for row in segments] == expected


def test_example_longer_than_a_row_raises_value_error():
    with pytest.raises(ValueError, match="4 tokens does not fit into rows of 3"):
        pack(EXAMPLES, 3)


def test_shuffled_batches_contain_every_row_once_per_epoch():
    batches = list(shuffled_batches(5, batch_size=2, num_batches=10, key=jax.random.key(0)))
    order = np.concatenate(batches)
    epochs = order.reshape(4, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = shuffled_batches(5, batch_size=2, num_batches=10, key=jax.random.key(0))
    np.testing.assert_array_equal(np.concatenate(list(again)), order)


def test_batch_may_be_larger_than_the_data():
    (batch,) = shuffled_batches(2, batch_size=5, num_batches=1, key=jax.random.key(0))
    assert np.bincount(batch).tolist() in ([2, 3], [3, 2])
