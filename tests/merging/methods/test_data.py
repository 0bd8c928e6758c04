"""Methods that read statistics of the experts on data, against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_leaf import PATH, SHAPE, as_float64, check, vectors

import sdjax
from sdjax.core.errors import UserError
from sdjax.merging.statistics import tensor_statistics

OUT, IN = SHAPE
GATE = "gram/layers/0/mlp/gate_proj"  # the entry of all maps with the same input


def tree(x):
    return {"layers": {"0": {"mlp": {"up_proj": jnp.asarray(x)}}}}


def run(name, stats, base=None, **hyperparameters):
    base = np.zeros(SHAPE, np.float32) if base is None else base
    experts = [tree(base + x) for x in vectors(len(stats))]
    merged = sdjax.merge(tree(base), experts, name, stats=stats, **hyperparameters)
    assert merged.finite
    return np.asarray(merged.params["layers"]["0"]["mlp"]["up_proj"], np.float64) - base


def fishers(count):
    rng = np.random.default_rng(3)
    return [rng.gamma(0.3, 1e-6 * (1 + j), SHAPE).astype(np.float32) for j in range(count)]


def test_fisher():
    information, weight = fishers(3), (0.2, 0.5, 0.9)
    shares = [w * f for w, f in zip(weight, as_float64(information), strict=True)]
    merged = sum(s * v for s, v in zip(shares, as_float64(vectors(3)), strict=True)) / sum(shares)
    stats = [{f"fisher/{PATH}": f} for f in information]
    check(run("fisher", stats, weight=weight), merged)
    # Averaging weights and averaging task vectors is the same.
    base = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    check(run("fisher", stats, base=base, weight=weight), merged, rtol=1e-4)


def test_fisher_without_information_is_the_average():
    nothing = np.zeros(SHAPE, np.float32)
    stats = [{f"fisher/{PATH}": nothing}, {f"fisher/{PATH}": nothing}]
    check(run("fisher", stats), sum(as_float64(vectors(2))) / 2)
    stats[1] = {f"fisher/{PATH}": nothing + 1e-12}
    check(run("fisher", stats), as_float64(vectors(2))[1])
    check(run("fisher", stats, floor=1e-6), sum(as_float64(vectors(2))) / 2)


def inputs(count):
    """Return the inputs of a linear map on the data of each expert, fewer than features."""
    rng = np.random.default_rng(5)
    return [rng.standard_normal((20, IN)) * rng.gamma(0.5, size=IN) for _ in range(count)]


def grams(count):
    return [(x.T @ x / len(x)).astype(np.float32) for x in inputs(count)]


@pytest.mark.parametrize("alpha", [0.9, 0.1])
def test_regmean(alpha):
    """Solve the least squares problem of the paper, for one row of the weights at a time."""
    weight = (0.2, 0.5, 0.9)
    stats = [{GATE: g} for g in grams(3)]
    # |(w - w_j) x|² over all data, and the diagonal's share of it, as one problem of rows.
    rows, targets = [], []
    for w, g, v in zip(weight, as_float64(grams(3)), as_float64(vectors(3)), strict=True):
        values, basis = np.linalg.eigh(alpha * g + (1 - alpha) * np.diag(np.diag(g)))
        root = np.sqrt(w * np.maximum(values, 0))[:, None] * basis.T
        rows.append(root)
        targets.append(root @ v.T)
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].T
    got = run("regmean", stats, weight=weight, alpha=alpha)
    error = [np.linalg.norm((got - expected) @ x.T) for x in inputs(3)]
    assert max(error) < 1e-3 * np.linalg.norm(expected @ inputs(3)[0].T)
    check(got, expected, rtol=2e-3)


def test_regmean_averages_what_has_no_input():
    weight, task_vectors = (1, 2, 3), as_float64(vectors(3))
    stats = [{"gram/layers/0/mlp/down_proj": np.eye(3)}] * 3
    mean = sum(w * v for w, v in zip(weight, task_vectors, strict=True)) / 6
    check(run("regmean", stats, weight=weight), mean)
    # Only the first expert has data, and only its first feature is ever nonzero.
    first, nothing = np.zeros((2, IN, IN), np.float32)
    first[0, 0] = 2.0
    mean[:, 0] = task_vectors[0][:, 0]
    got = run("regmean", [{GATE: first}, {GATE: nothing}, {GATE: nothing}], weight=weight)
    check(got, mean, rtol=1e-4)


def test_statistics_under_transformations():
    stats = [{f"fisher/{PATH}": f} for f in fishers(2)]
    experts = [tree(x) for x in vectors(2)]
    base = tree(np.zeros(SHAPE, np.float32))

    def loss(weight):
        merged = sdjax.merge(base, experts, "fisher", stats=stats, weight=weight)
        return jnp.sum(merged.params["layers"]["0"]["mlp"]["up_proj"] ** 2)

    gradient = jax.jit(jax.grad(loss))(jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-3 * abs(gradient[0]))
    assert np.all(gradient != 0)
    by_name = dict(zip(("b", "a"), stats, strict=True))
    named = dict(zip(("b", "a"), experts, strict=True))
    first, second = (
        sdjax.merge(base, named, "fisher", stats=by_name),
        sdjax.merge(base, experts, "fisher", stats=stats),
    )
    np.testing.assert_array_equal(
        *(m.params["layers"]["0"]["mlp"]["up_proj"] for m in (first, second))
    )


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (
            None,
            r"fisher needs statistics of the experts on data \(fisher\); compute them with `sdj",
        ),
        ([{}], "stats has 1 entries for 2 experts"),
        ([{"fisher/x": 0}, {"gram/x": 0}], "fisher: the statistics of expert_2 have no fisher; "),
        (
            [{f"fisher/{PATH}": fishers(1)[0]}, {"fisher/x": 0}],
            f"the statistics of expert_2 lack fisher/{PATH}, which those of expert_1 have",
        ),
        (
            [{f"fisher/{PATH}": np.ones(4)}, {f"fisher/{PATH}": np.ones(4)}],
            rf"expert_1: fisher/{PATH} has shape \[4\], not \[40, 30\]; they belong to another",
        ),
        ({"a": {}, "b": {}}, "stats by name needs experts by name"),
    ],
)
def test_missing_or_foreign_statistics_are_an_error(stats, message):
    base, experts = tree(np.zeros(SHAPE, np.float32)), [tree(x) for x in vectors(2)]
    with pytest.raises(UserError, match=message):
        sdjax.merge(base, experts, "fisher", stats=stats)


def test_only_what_is_requested_is_read():
    assert tensor_statistics({"base"}, [{}], ["a"], PATH, SHAPE) == {}
    assert tensor_statistics({"gram"}, [{}], ["a"], "norm", (4,)) == {"gram": None}
