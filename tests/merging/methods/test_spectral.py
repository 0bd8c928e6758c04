"""Methods on singular values and vectors against float64 references, written from the papers."""

import numpy as np
import pytest
from one_leaf import SHAPE, as_float64, check, run, vectors

RANK = min(SHAPE)


def svd(x):
    return np.linalg.svd(x, full_matrices=False)


def orthonormal(x):
    u, _, vt = svd(x)
    return u @ vt


@pytest.mark.parametrize("rank", [0, 4])
def test_tsv(rank):
    kept = rank or RANK // 3
    parts = [svd(v) for v in as_float64(vectors(3))]
    left = orthonormal(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    right = orthonormal(np.concatenate([vt[:kept].T for _, _, vt in parts], axis=1))
    values = np.concatenate([s[:kept] for _, s, _ in parts])
    check(run("tsv", vectors(3), rank=rank), left @ np.diag(values) @ right.T, rtol=1e-4)


def test_iso_c():
    u, s, vt = svd(sum(as_float64(vectors(3))))
    check(run("iso_c", vectors(3), scale=0.7), 0.7 * s.mean() * u @ vt, rtol=1e-4)


def iso_cts(task_vectors, fraction):
    """Fill zero matrices with the directions of each expert, then the common ones."""
    count, common = len(task_vectors), int(RANK * fraction)
    common = RANK - round((RANK - common) / count) * count
    u, s, vt = svd(sum(task_vectors))
    left, values, right = np.zeros_like(u), np.zeros_like(s), np.zeros_like(vt)
    own = (RANK - common) // count
    for j, v in enumerate(task_vectors):
        at = slice(j * own, (j + 1) * own)
        parts = svd(v - u[:, :common] @ u[:, :common].T @ v)
        left[:, at], values[at], right[at] = parts[0][:, :own], parts[1][:own], parts[2][:own]
    at = slice(count * own, None)
    left[:, at], values[at], right[at] = u[:, :common], s[:common], vt[:common]
    return values.mean() * orthonormal(left) @ orthonormal(right)


@pytest.mark.parametrize("fraction", [0.8, 0.5, 1.0])
def test_iso_cts(fraction):
    expected = iso_cts(as_float64(vectors(3)), fraction)
    check(run("iso_cts", vectors(3), scale=0.7, common_fraction=fraction), 0.7 * expected, 1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_subspace_boosting(beta):
    weight = (0.2, 0.5, 0.9)
    u, s, vt = svd(sum(w * v for w, v in zip(weight, as_float64(vectors(3)), strict=True)))
    cutoff = np.flatnonzero(np.cumsum(s) / s.sum() >= beta)[0]
    assert (cutoff > 0) == (beta > 0)
    expected = u @ np.diag(np.maximum(s, s[cutoff])) @ vt
    got = run("subspace_boosting", vectors(3), weight=weight, beta=beta, scale=0.7)
    check(got, 0.7 * expected, rtol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 1 / 3])
def test_svc(alpha):
    task_vectors = as_float64(vectors(3))
    merged = sum(task_vectors)
    u, s, vt = svd(merged)
    factors = []
    for left in u.T:
        responses = [left @ v for v in task_vectors]
        ratios = [(left @ merged) @ a / (a @ a) for a in responses]
        factors.append(3 / sum(max(alpha, ratio) for ratio in ratios))
    assert (max(factors) > 1) == (alpha < 1)
    check(run("svc", vectors(3), alpha=alpha), u @ np.diag(factors * s) @ vt, rtol=1e-4)


def test_opcm():
    """Use the full bases, as the paper does; the method needs only the thin ones."""
    first, *others = as_float64(vectors(3))
    merged = first
    for v in others:
        u, s, vt = np.linalg.svd(merged)
        inside = (u.T @ v) @ vt.T
        np.fill_diagonal(inside, 0)
        block = np.argmax(np.cumsum(s) / s.sum() > 0.4)
        assert 0 < block < RANK
        inside[:block, :block] = 0
        merged = merged + u @ inside @ vt
    norm = np.mean([np.linalg.norm(v) for v in as_float64(vectors(3))])
    expected = merged * norm / np.linalg.norm(merged)
    check(run("opcm", vectors(3), alpha=0.4), expected, rtol=1e-4)


def adam(gradient, start, steps, rate):
    value, mean, square = start.copy(), 0.0, 0.0
    for t in range(1, steps + 1):
        slope = gradient(value)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        value -= rate * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
    return value


def central_difference(objective, at, direction, step=1e-5):
    return (objective(at + step * direction) - objective(at - step * direction)) / (2 * step)


def test_wudi():
    task_vectors = as_float64(vectors(3))

    def objective(merged):
        return sum(np.sum(((merged - v) @ v.T) ** 2) / np.sum(v**2) for v in task_vectors)

    def gradient(merged):
        return sum(2 * (merged - v) @ v.T @ v / np.sum(v**2) for v in task_vectors)

    start = sum(task_vectors)
    slope = central_difference(objective, start, task_vectors[0])
    assert slope == pytest.approx(np.sum(gradient(start) * task_vectors[0]), rel=1e-6)
    expected = adam(gradient, start, 20, 0.03)
    assert objective(expected) < 0.9 * objective(start)
    check(run("wudi", vectors(3), steps=20, learning_rate=0.03), expected, rtol=1e-4)


def test_doge():
    task_vectors, eta, density = as_float64(vectors(3)), 0.2, 0.3
    weights = [eta / np.linalg.norm(v) for v in task_vectors]

    def objective(delta):
        merged = sum(w * (v + delta) for w, v in zip(weights, task_vectors, strict=True))
        return sum(np.sum((v * (v - merged)).sum(axis=1) ** 2) for v in task_vectors)

    lefts = np.concatenate([svd(v)[0][:, : RANK // 3] for v in task_vectors], axis=1)
    shared = svd(lefts)[0][:, : RANK // 4]

    def full_gradient(delta):
        merged = sum(w * (v + delta) for w, v in zip(weights, task_vectors, strict=True))
        rows = [(v * (v - merged)).sum(axis=1, keepdims=True) for v in task_vectors]
        slope = sum(r * v for r, v in zip(rows, task_vectors, strict=True))
        return -2 * sum(weights) * slope

    def gradient(delta):
        slope = full_gradient(delta)
        return slope - shared @ shared.T @ slope

    zero, first = np.zeros(SHAPE), task_vectors[0]
    slope = central_difference(objective, zero, first)
    assert slope == pytest.approx(np.sum(full_gradient(zero) * first), rel=1e-6)
    delta = adam(gradient, zero, 20, 0.05)
    expected = np.zeros(SHAPE)
    for w, v in zip(weights, task_vectors, strict=True):
        smallest = np.sort(np.abs(v), axis=None)[-int(density * v.size)]
        expected += w * np.where(np.abs(v) >= smallest, v + delta, 0)
    settings = {"eta": eta, "density": density, "subspace": 4}
    check(run("doge", vectors(3), steps=20, learning_rate=0.05, **settings), expected, rtol=1e-4)


AVERAGED, ADDED = ("tsv", "iso_c", "iso_cts", "wudi"), ("subspace_boosting", "svc")


@pytest.mark.parametrize("name", [*AVERAGED, *ADDED, "doge", "opcm"])
def test_tensors_that_are_not_matrices(name):
    rows = [x[0] for x in vectors(3)]
    total, norms = sum(as_float64(rows)), [np.linalg.norm(x) for x in as_float64(rows)]
    expected = {
        **dict.fromkeys(AVERAGED, total / 3),
        "subspace_boosting": 0.4 * total,
        "svc": total,
        "doge": 0 * total,
        "opcm": total * np.mean(norms) / np.linalg.norm(total),
    }
    check(run(name, rows), expected[name])
