"""Methods that select elements, against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_leaf import SHAPE, as_float64, check, leaf_key, run, vectors

from sdjax.core.errors import UserError
from sdjax.merging.engine import merge
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.operations.random import uniform


def mask_out(v, density, gamma):
    """Sort by magnitude, drop the fraction gamma, keep the fraction density below it."""
    kept, top = int(density * v.size), int(gamma * v.size)
    order = np.argsort(-np.abs(v), axis=None, kind="stable")
    start = min(top, v.size - kept)
    out = np.zeros(v.size)
    chosen = order[start : start + kept]
    out[chosen] = v.ravel()[chosen]
    return out.reshape(v.shape)


def test_breadcrumbs():
    weights, densities, gammas = (0.5, 0.3, 0.8), (0.3, 0.6, 0.97), (0.01, 0.1, 0.1)
    kept = [mask_out(*x) for x in zip(as_float64(vectors(3)), densities, gammas, strict=True)]
    settings = {"weight": weights, "density": densities, "gamma": gammas}
    expected = sum(w * x for w, x in zip(weights, kept, strict=True))
    check(run("breadcrumbs", vectors(3), **settings, scale=0.5), 0.5 * expected)
    sign = np.where(expected >= 0, 1, -1)
    agreeing = sum(
        np.where(np.sign(x) == sign, w * x, 0) for w, x in zip(weights, kept, strict=True)
    )
    check(run("breadcrumbs_ties", vectors(3), **settings), agreeing)
    assert not np.allclose(expected, agreeing)


def della(task_vectors, densities, epsilons, rescale):
    out = []
    for stream, (v, density, epsilon) in enumerate(
        zip(task_vectors, densities, epsilons, strict=True)
    ):
        ranks = np.abs(v).argsort(axis=1).argsort(axis=1)
        keep = density - epsilon + 2 * epsilon * ranks / (v.shape[1] - 1)
        kept = np.where(np.asarray(uniform(leaf_key(), SHAPE, stream)) < keep, v, 0)
        factor = {"density": 1 / keep, "none": 1.0, "l1": np.abs(v).sum() / np.abs(kept).sum()}
        out.append(kept * factor[rescale])
    return out


@pytest.mark.parametrize("rescale", ["density", "l1", pytest.param("none", marks=pytest.mark.slow)])
def test_della(rescale):
    weights, densities, epsilons = (0.5, 0.3, 0.8), (0.3, 0.6, 0.9), (0.15, 0.05, 0.09)
    kept = della(as_float64(vectors(3)), densities, epsilons, rescale)
    settings = {
        "weight": weights,
        "density": densities,
        "epsilon": epsilons,
        "rescale": rescale,
    }
    expected = sum(w * x for w, x in zip(weights, kept, strict=True))
    check(run("della_linear", vectors(3), **settings), expected)
    sign = np.where(expected >= 0, 1, -1)
    agrees = [np.sign(x) == sign for x in kept]
    total = sum(w * x * a for w, x, a in zip(weights, kept, agrees, strict=True))
    part = sum(w * a for w, a in zip(weights, agrees, strict=True))
    check(run("della", vectors(3), **settings), total / np.where(part == 0, 1, part))


def test_della_keeps_the_density_and_prefers_large_elements():
    (v,) = vectors(1)
    kept = run("della_linear", [v], weight=1.0, density=0.4, epsilon=0.3, rescale="none") != 0
    assert kept.mean() == pytest.approx(0.4, abs=0.06)
    half = np.median(np.abs(v), axis=1, keepdims=True)
    assert kept[np.abs(v) >= half].mean() > kept[np.abs(v) < half].mean() + 0.2
    check(run("della_linear", [v], weight=1.0, density=1.0), as_float64([v])[0])
    assert not run("della_linear", [v], weight=1.0, density=0.0).any()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_sce(normalize, share):
    task_vectors = np.stack(as_float64(vectors(3)))
    variance = task_vectors.var(axis=0)
    count = int(share * np.count_nonzero(variance))
    chosen = task_vectors * (variance >= np.sort(variance.ravel())[-count])
    weights = (chosen**2).mean(axis=(1, 2))
    weights = (weights / weights.sum())[:, None, None]
    agrees = np.sign(chosen) == np.where(chosen.sum(axis=0) >= 0, 1, -1)
    expected = (chosen * weights * agrees).sum(axis=0)
    if normalize:
        expected /= np.maximum((weights * agrees).sum(axis=0), 1e-6)
    check(run("sce", vectors(3), select_topk=share, normalize=normalize), expected)


def test_sce_of_equal_experts_selects_nothing():
    (v,) = vectors(1)
    assert not run("sce", [v, v], select_topk=0.5).any()
    check(run("sce", [v, v], select_topk=1.0), as_float64([v])[0])


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_arcee_fusion(size):
    """Check small changes, whose divergence the plain formula loses in float32."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(SHAPE).astype(np.float32)
    vector = np.float32(size) * vectors(1)[0]
    (v,) = as_float64([base + vector - base])

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True) + 1e-8

    p, q = softmax(base + v), softmax(np.asarray(base, np.float64))
    importance = np.abs(v) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[int(s * (v.size - 1))] for s in (0.25, 0.5, 0.75))
    expected = np.where(importance >= median + 1.5 * (third - first), v, 0)
    check(run("arcee_fusion", [vector], base=base), expected)
    assert 0.01 < np.mean(expected != 0) < 0.4


def test_nearswap():
    (v,) = as_float64(vectors(1))
    expected = np.clip(0.7 / np.maximum(np.abs(v), 1e-6), 0, 1) * v
    check(run("nearswap", vectors(1), t=0.7), expected)


def sparse(count):
    """Return sparse task vectors, as reinforcement learning produces them."""
    rng = np.random.default_rng(7)
    return [np.where(rng.random(SHAPE) < 0.4, x, 0).astype(np.float32) for x in vectors(count)]


def test_ram_and_ramplus():
    task_vectors = np.stack(as_float64(sparse(3)))
    count = (np.abs(task_vectors) > 1e-5).sum(axis=0)
    check(run("ram", sparse(3)), task_vectors.sum(axis=0) / np.maximum(count, 1))
    scaled = []
    for v in task_vectors:
        changed = np.abs(v) > 1e-5
        ratio = (changed & (count > 1)).sum() / (changed & (count == 1)).sum()
        scaled.append(
            np.where(count == 1, (1 + 0.3 * min(ratio, 0.9)) * v, v / np.maximum(count, 1))
        )
    check(run("ramplus_tl", sparse(3), r=0.3, alpha=0.9), sum(scaled))


def test_ramplus_with_an_unchanged_expert():
    one = sparse(1)[0]
    both = [one, np.zeros_like(one)]
    np.testing.assert_array_equal(run("ramplus_tl", both, epsilon=0.0), run("ramplus_tl", both))


def test_passthrough():
    (v,) = vectors(1)
    check(run("passthrough", [v]), as_float64([v])[0])
    check(run("passthrough", [v], scale=0.5), 0.5 * as_float64([v])[0])


@pytest.mark.parametrize("name", ["passthrough", "nearswap", "arcee_fusion", "expo"])
def test_wrong_number_of_experts_raises_user_error(name):
    with pytest.raises(UserError, match="exactly one expert"):
        run(name, vectors(2))


def test_consensus():
    task_vectors, ratios, weight = np.stack(as_float64(vectors(3))), (0.2, 0.4, 1.5), (0.5, 1, 0.8)
    total = sum(w * v for w, v in zip(weight, task_vectors, strict=True))
    # As in the authors' code: distances of the base and of the merged weights to the expert's.
    masks = [abs(0 - v) > abs(total - v) * r for v, r in zip(task_vectors, ratios, strict=True)]
    for least in (1, 2, 4):
        kept = sum(mask.astype(int) for mask in masks) >= least
        got = run(
            "consensus", vectors(3), mask_ratio=ratios, weight=weight, scale=0.7, min_experts=least
        )
        check(got, 0.7 * kept * total)
        assert kept.any() == (least < 4)


def pcb(task_vectors, ratio):
    """Follow the authors' code, with its sorts."""
    flat = np.stack([v.ravel() for v in task_vectors])

    def clamp(x, low, high):
        ordered, size = np.sort(x, axis=1), x.shape[1]
        at = [int(size * low), int(size * (1 - high) - 1)]
        return np.clip(x, *(ordered[:, [i]] for i in at))

    def normalize(x):
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        return (x - low) / (high - low)

    magnitude = clamp(np.abs(flat), 1e-4, 1e-4)
    own = np.exp(len(flat) * normalize(magnitude) ** 2)
    scale = normalize(clamp(own * np.tanh(flat * flat.sum(axis=0)), 1 - ratio, 0))
    merged = (np.sign(flat) * magnitude * scale).sum(axis=0)
    return (merged / np.maximum(scale.sum(axis=0), 1e-12)).reshape(SHAPE)


@pytest.mark.parametrize("density", [0.125, 0.75])
def test_pcb(density):
    """Check thresholds among the positive and among the negative scores."""
    expected = 0.7 * pcb(as_float64(vectors(3)), density)
    check(run("pcb", vectors(3), density=density, scale=0.7), expected, rtol=2e-5)


def test_expo():
    (v,) = as_float64(vectors(1))
    check(run("expo", vectors(1), alpha=0.5), v + 0.5 * v)


def test_lines():
    """Check the weights of three layers and of a tensor outside of them."""
    rng = np.random.default_rng(0)
    tree = {
        "norm": rng.standard_normal(5),
        "layers": {str(i): {"w": rng.standard_normal((4, 3))} for i in range(3)},
    }
    base = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
    experts = [jax.tree.map(lambda x, f=f: jnp.asarray(f * x, jnp.float32), tree) for f in (1, 3)]
    merged = merge(base, experts, algorithm("lines", alpha=0.8, beta=0.6, weight=(1.0, 0.5)))
    for i, weight in enumerate((0.4, 0.7, 1.0)):
        want = weight * 2.5 * tree["layers"][str(i)]["w"]
        check(np.asarray(merged.params["layers"][str(i)]["w"]), want)
    check(np.asarray(merged.params["norm"]), 0.4 * 2.5 * tree["norm"])
