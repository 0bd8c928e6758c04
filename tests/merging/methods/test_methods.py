"""Sums, sign elections and random drops against float64 references written from the papers."""

import itertools

import numpy as np
import pytest
from one_leaf import SHAPE, as_float64, check, leaf_key, run, vectors

from sdjax.core.errors import UserError
from sdjax.merging.methods.registry import methods
from sdjax.merging.operations.random import bernoulli


@pytest.mark.parametrize("weight", [1.0, (0.2, 0.5, 0.9)])
def test_linear(weight):
    v, w = as_float64(vectors(3)), np.broadcast_to(weight, 3)
    expected = sum(a * x for a, x in zip(w, v, strict=True))
    check(run("linear", vectors(3), weight=weight), expected / w.sum())
    check(run("linear", vectors(3), weight=weight, normalize=False), expected)


def test_weights_that_sum_to_zero_cannot_be_normalized():
    v = as_float64(vectors(2))
    cancel = {"weight": (1.0, -1.0)}
    check(run("linear", vectors(2), **cancel, normalize=False), v[0] - v[1])
    for name in ("linear", "multislerp", "task_arithmetic", "breadcrumbs", "dare_linear"):
        with pytest.raises(UserError, match="'weight' sums to zero"):
            methods()[name].bind(**cancel, normalize=True)
    with pytest.raises(UserError, match="or set normalize to false"):
        methods()["linear"].bind(**cancel)
    for weight in (0.0, (0.0, 0.0), {"expert_1": 0.0, "expert_2": 0}):
        with pytest.raises(UserError, match=r"linear: .*normalized; change it$"):
            methods()["linear"].bind().bind(weight=weight)
        # Zero weights leave the base of a method that has one; a gradient over layers may end so.
        methods()["task_arithmetic"].bind(weight=weight, normalize=True)


@pytest.mark.parametrize(("name", "key"), [("ties", "density"), ("sce", "select_topk")])
def test_fractions_must_be_in_the_unit_interval(name, key):
    for value in (2.0, -0.1):
        with pytest.raises(
            UserError, match=f"{name}: hyperparameter '{key}' must be a number from"
        ):
            methods()[name].bind(**{key: value})
        with pytest.raises(UserError, match="must be a number from 0 to 1"):
            methods()[name].bind().bind(**{key: value})
    with pytest.raises(UserError, match=r"must be a number from 0 to 1, not 1\.5"):
        methods()["ties"].bind(density=(0.5, 1.5))
    methods()[name].bind(**{key: 1})


def test_task_arithmetic():
    v = as_float64(vectors(3))
    check(run("task_arithmetic", vectors(3)), 0.4 * sum(v))
    got = run("task_arithmetic", vectors(3), weight=(0.1, -0.2, 0.7), scale=1.5)
    check(got, 1.5 * (0.1 * v[0] - 0.2 * v[1] + 0.7 * v[2]))
    got = run("task_arithmetic", vectors(3), weight=(0.1, 0.2, 0.3), normalize=True)
    check(got, (0.1 * v[0] + 0.2 * v[1] + 0.3 * v[2]) / 0.6)


def trim(v, density):
    """Trim by sorting, as in the paper."""
    k = int(density * v.size)
    keep = np.argsort(-np.abs(v), axis=None, kind="stable")[:k]
    out = np.zeros(v.size)
    out[keep] = v.ravel()[keep]
    return out.reshape(v.shape)


def disjoint_mean(task_vectors, ballots, weights, normalize=True):
    """Elect signs and merge the agreeing elements one by one, as in TIES."""
    out = np.zeros(SHAPE)
    for at in np.ndindex(*SHAPE):
        sign = 1 if sum(b[at] for b in ballots) >= 0 else -1
        agree = [j for j, b in enumerate(ballots) if np.sign(b[at]) == sign]
        if agree:
            out[at] = sum(weights[j] * task_vectors[j][at] for j in agree)
            out[at] /= sum(weights[j] for j in agree) if normalize else 1
    return out


@pytest.mark.parametrize("elect", ["weighted", "plain"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(elect, normalize):
    weights, density = (0.3, 1.0, 0.6), (0.2, 0.5, 1.0)
    trimmed = [trim(v, d) for v, d in zip(as_float64(vectors(3)), density, strict=True)]
    weighted = [w * t for w, t in zip(weights, trimmed, strict=True)]
    expected = 0.7 * disjoint_mean(
        trimmed, weighted if elect == "weighted" else trimmed, weights, normalize
    )
    got = run(
        "ties",
        vectors(3),
        weight=weights,
        density=density,
        scale=0.7,
        elect=elect,
        normalize=normalize,
    )
    check(got, expected)
    # The two elections must differ on this input for the parameter to be tested.
    other = disjoint_mean(trimmed, trimmed if elect == "weighted" else weighted, weights, normalize)
    assert not np.allclose(0.7 * other, expected)


def dropped(task_vectors, densities, rescale):
    out = []
    for stream, (v, density) in enumerate(zip(task_vectors, densities, strict=True)):
        kept = v * np.asarray(bernoulli(leaf_key(), density, SHAPE, stream))
        factor = {"density": 1 / density, "none": 1.0, "l1": np.abs(v).sum() / np.abs(kept).sum()}
        out.append(kept * factor[rescale])
    return out


@pytest.mark.parametrize("rescale", ["density", "l1", pytest.param("none", marks=pytest.mark.slow)])
def test_dare(rescale):
    weights, densities = (0.5, 0.3, 0.8), (0.3, 0.6, 0.9)
    d = dropped(as_float64(vectors(3)), densities, rescale)
    shares = [np.mean(x != 0) for x in d]
    np.testing.assert_allclose(shares, densities, atol=0.06)
    settings = {"weight": weights, "density": densities, "rescale": rescale}
    expected = sum(w * x for w, x in zip(weights, d, strict=True))
    check(run("dare_linear", vectors(3), **settings), expected)
    weighted = [w * x for w, x in zip(weights, d, strict=True)]
    check(
        run("dare_ties", vectors(3), **settings),
        disjoint_mean(d, weighted, weights, normalize=False),
    )


def test_dare_with_density_1_is_task_arithmetic():
    got = run("dare_linear", vectors(3), density=1.0)
    check(got, 0.4 * sum(as_float64(vectors(3))))
    assert not run("dare_linear", vectors(3), density=0.0).any()


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(filter_wise):
    v = as_float64(vectors(3))
    rows = [x if filter_wise else x.reshape(1, -1) for x in v]
    expected = np.zeros_like(rows[0])
    for r in range(len(rows[0])):
        pairs = itertools.combinations([x[r] for x in rows], 2)
        c = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
        expected[r] = 3 * c / (1 + 2 * c) * np.mean([x[r] for x in rows], axis=0)
    got = run("model_stock", vectors(3), filter_wise=filter_wise)
    # The cosine of a row may be close to zero, where its float32 error is larger.
    check(got, expected.reshape(SHAPE), rtol=1e-4 if filter_wise else 1e-5)


def test_model_stock_needs_two_experts():
    with pytest.raises(UserError, match="at least two experts"):
        run("model_stock", vectors(1))


def test_magmax():
    v = np.stack(as_float64(vectors(3)))
    expected = np.take_along_axis(v, np.abs(v).argmax(0)[None], axis=0)[0]
    check(run("magmax", vectors(3), scale=0.5), 0.5 * expected)


def test_self_developing_a():
    merged = np.zeros(SHAPE)
    for v in as_float64(vectors(3)):
        merged = 0.5 * merged + 0.5 * v.mean(axis=1)[:, None]
    check(run("self_developing_a", vectors(3)), merged)


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_invalid_options_raise_user_error(name):
    with pytest.raises(UserError, match="elect must be one of weighted, plain, not 'x'"):
        run(name, vectors(2), elect="x")
