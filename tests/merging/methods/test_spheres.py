"""Spherical methods against float64 references."""

import numpy as np
import pytest
from one_leaf import SHAPE, as_float64, check, run, vectors

from sdjax.core.errors import UserError


def slerp_weights(a, b, t):
    cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_of_two(t):
    a, b = as_float64(vectors(2))
    check(run("slerp", vectors(2), t=t), slerp_weights(a, b, t))


def test_slerp_of_three_in_slot_order():
    a, b, c = as_float64(vectors(3))
    check(run("slerp", vectors(3)), slerp_weights(slerp_weights(a, b, 0.5), c, 1 / 3))


def test_slerp_of_parallel_tensors_is_linear():
    a = vectors(1)[0]
    check(run("slerp", [a, 3 * a], t=0.25), 1.5 * np.asarray(a, np.float64))
    check(run("slerp", [a, 0 * a], t=0.25), arc_with_zero(a, 0.25))


def arc_with_zero(a, t):
    # The angle to zero is undefined; as in mergekit the cosine is taken as 0.
    return np.sin((1 - t) * np.pi / 2) * np.asarray(a, np.float64)


@pytest.mark.parametrize(
    ("settings", "axis"),
    [
        ({}, None),
        ({"flatten": False}, 1),
        ({"flatten": False, "row_wise": True}, 0),
    ],
)
def test_nuslerp(settings, axis):
    a, b = as_float64(vectors(2))
    t = 0.9 / (0.3 + 0.9)
    if axis is None:
        expected = slerp_weights(a, b, t)
    else:
        lines = [np.moveaxis(x, axis, 0) for x in (a.T, b.T)] if axis == 0 else [a, b]
        lines = [a, b] if axis == 1 else [a.T, b.T]
        expected = np.stack([slerp_weights(x, y, t) for x, y in zip(*lines, strict=True)])
        expected = expected if axis == 1 else expected.T
    check(run("nuslerp", vectors(2), weight=(0.3, 0.9), **settings), expected)


def test_nuslerp_of_equal_tensors_and_canceling_weights():
    a, b = vectors(2)
    check(run("nuslerp", [a, a], weight=(0.3, 0.9)), as_float64([a])[0])
    check(run("nuslerp", [a, b], weight=(1.0, -1.0)), slerp_weights(*as_float64([a, b]), 0.5))
    with pytest.raises(UserError, match="exactly two experts"):
        run("nuslerp", vectors(3))


def multislerp(task_vectors, weights, normalize):
    """Reference with the tangent-space step that the method omits."""
    flat = np.stack([x.ravel() for x in task_vectors])
    w = np.asarray(weights) / (np.sum(weights) if normalize else 1)
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    mean = w @ units
    mean /= np.linalg.norm(mean)
    tangent = w @ (units - np.outer(units @ mean, mean))
    step = np.linalg.norm(tangent) + 1e-300
    on_sphere = np.cos(step) * mean + np.sin(step) / step * tangent
    return (on_sphere * (lengths @ w)).reshape(SHAPE)


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(normalize):
    weights = (0.2, 0.5, 0.9)
    got = run("multislerp", vectors(3), weight=weights, normalize=normalize)
    check(got, multislerp(as_float64(vectors(3)), weights, normalize))
    check(run("multislerp", vectors(1)), as_float64(vectors(1))[0])


def test_multislerp_of_opposite_tensors_is_their_average():
    (a,) = vectors(1)
    check(run("multislerp", [3 * a, -a]), as_float64([a])[0])


def karcher(task_vectors, iterations=100):
    flat = np.stack([x.ravel() for x in task_vectors])
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    mean = units.mean(axis=0)
    mean /= np.linalg.norm(mean)
    for _ in range(iterations):
        angles = np.arccos(np.clip(units @ mean, -1, 1))
        pulls = (angles / np.sin(angles))[:, None] * (units - np.outer(units @ mean, mean))
        tangent = pulls.mean(axis=0)
        step = np.linalg.norm(tangent)
        if step < 1e-14:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
    return (lengths.mean() * mean).reshape(SHAPE)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher(count):
    check(run("karcher", vectors(count), max_iter=100), karcher(as_float64(vectors(count))))


def test_karcher_stops_after_max_iter():
    # The iterates differ in the fourth digit here, which shows the number of steps.
    skew = [x * 1.0 for x in vectors(4)]
    skew[1] = skew[0] + 0.1 * skew[1]
    for steps in (0, 1):
        got = run("karcher", skew, max_iter=steps)
        check(got, karcher(as_float64(skew), iterations=steps))
    assert not np.allclose(karcher(as_float64(skew), 0), karcher(as_float64(skew), 1), rtol=1e-4)


def test_karcher_of_special_tensors():
    a, b = vectors(2)
    check(run("karcher", [a, 0 * a, 0 * b]), as_float64([a])[0] / 3)  # no direction, but a length
    check(run("karcher", [a, -a]), as_float64([a])[0])  # no mean: the first expert's direction
    check(run("karcher", [a, 2 * a]), 1.5 * as_float64([a])[0])
    check(run("karcher", [a]), as_float64([a])[0])
