"""Merges inside jit, grad and vmap, and of shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm, PerExpert
from sdjax.merging.methods.registry import methods
from sdjax.merging.model_tree import ModelTree


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 4), "b": (6, 4), "c": (3,)}
    return {
        "layers": [{k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}]
    }


BASE, EXPERTS, KEY = tree(0), [tree(1), tree(2)], jax.random.key(0)


def check_close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def total(merged):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(merged.params))


@pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
def test_jit_gives_the_same_result(name):
    @jax.jit
    def run(base, experts):
        return sdjax.merge(base, experts, name)

    expected = sdjax.merge(BASE, EXPERTS, name)
    check_close(run(BASE, EXPERTS), expected)
    assert repr(run(BASE, EXPERTS)) == "MergedModel(3 of 3 tensors merged)"
    # With concrete weights that the traced function closes over.
    arrays = jax.tree.map(np.asarray, EXPERTS)
    check_close(jax.jit(lambda: sdjax.merge(BASE, arrays, name).params)(), expected.params)


def test_tensors_that_no_expert_changed_keep_their_value_while_traced():
    def noise(task_vectors):
        return 0 * task_vectors["expert_1"] + 1.0

    def merge_trees(task_vectors):
        return {path: 0 * vector + 1.0 for path, vector in task_vectors["expert_1"].items()}

    expert = {"layers": [{**BASE["layers"][0], "a": EXPERTS[0]["layers"][0]["a"]}]}
    for function in (noise, merge_trees):
        expected = sdjax.merge(BASE, [expert], function)
        got = jax.jit(lambda base, e, f=function: sdjax.merge(base, [e], f))(BASE, expert)
        check_close(got, expected)
        np.testing.assert_array_equal(got.params["layers"][0]["b"], BASE["layers"][0]["b"])


def test_result_that_is_not_finite_is_flagged_while_traced():
    def poisoned(task_vectors):
        return task_vectors["expert_1"] / 0

    merged = jax.jit(lambda base, expert: sdjax.merge(base, [expert], poisoned))(BASE, EXPERTS[0])
    assert not merged.finite
    assert not np.isfinite(merged.change)


def test_gradient_of_hyperparameters_matches_finite_differences():
    def blend(task_vectors, weight: PerExpert = 1.0, scale: float = 1.0):
        return scale * sum(weight[name] ** 2 * v for name, v in task_vectors.items())

    merger, algorithm = sdjax.Merger(BASE, EXPERTS), Algorithm.from_function(blend)

    def loss(weight, scale):
        return total(merger(algorithm.bind(weight=weight, scale=scale)))

    weight, scale = jnp.array([0.3, 0.6]), jnp.float32(0.7)
    gradient = jax.grad(loss, argnums=(0, 1))(weight, scale)
    step = 1e-2

    def slope(high, low):
        return float(loss(*high) - loss(*low)) / (2 * step)

    by_weight = [
        slope((weight.at[i].add(step), scale), (weight.at[i].add(-step), scale)) for i in range(2)
    ]
    np.testing.assert_allclose(gradient[0], by_weight, rtol=1e-2, atol=1e-2)
    by_scale = slope((weight, scale + step), (weight, scale - step))
    np.testing.assert_allclose(gradient[1], by_scale, rtol=1e-2, atol=1e-2)
    by_name = jax.grad(lambda w: loss({"expert_1": w, "expert_2": 0.6}, scale))(0.3)
    np.testing.assert_allclose(by_name, gradient[0][0], rtol=1e-5)


QUICK = ("ties", "slerp", "model_stock")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in methods()],
)
def test_every_method_is_differentiable_in_an_expert(name, make_stats):
    count = methods()[name].schema.max_models
    stats = [make_stats(expert) for expert in EXPERTS][:count]

    def loss(expert):
        experts = [expert, EXPERTS[1]][:count]
        return total(sdjax.merge(BASE, experts, name, key=KEY, stats=stats))

    if name == "iso_cts":
        with pytest.raises(UserError, match="no derivative here: in iso_cts"):
            jax.grad(loss)(EXPERTS[0])
        return
    gradient = jax.grad(loss)(EXPERTS[0])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_vmap_merges_a_batch_of_weights_and_of_experts():
    weights = jnp.array([0.2, 0.5, 0.9])
    merged = jax.vmap(lambda w: sdjax.merge(BASE, EXPERTS, "ties", scale=w))(weights)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *EXPERTS)
    by_expert = jax.vmap(lambda e: sdjax.merge(BASE, [e], "dare_ties", key=KEY))(batch)
    for i, weight in enumerate(weights):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], merged)
        check_close(one, sdjax.merge(BASE, EXPERTS, "ties", scale=float(weight)))
    for i, expert in enumerate(EXPERTS):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], by_expert)
        check_close(one, sdjax.merge(BASE, [expert], "dare_ties", key=KEY))


def test_shapes_alone_give_shapes():
    shapes = jax.eval_shape(lambda: (BASE, EXPERTS))
    named = {"y": shapes[1][0], "x": shapes[1][1]}  # slot order, not that of the names
    merged = sdjax.merge(shapes[0], named, "slerp")
    assert jax.tree.map(lambda leaf: leaf.shape, merged.params) == jax.tree.map(
        lambda leaf: leaf.shape, BASE
    )
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(merged))
    assert merged.merged == ("layers/0/a", "layers/0/b", "layers/0/c")
    with pytest.raises(UserError, match=r"'layers/0/a': expert_1 has shape \[6, 4\], the base"):
        sdjax.merge({"layers": [{"a": jnp.zeros(3)}]}, shapes[1][:1], "linear", scope="*/a")
    with pytest.raises(UserError, match="has a shape but no values"):
        sdjax.Merger(*shapes)


def test_what_cannot_be_traced_is_a_user_error():
    with pytest.raises(UserError, match="dare_ties: the key must not be traced; create it outside"):
        jax.jit(lambda key: sdjax.merge(BASE, EXPERTS, "dare_ties", key=key).params)(KEY)
    earlier = sdjax.merge(BASE, EXPERTS, "linear")
    with pytest.raises(UserError, match="donate cannot be used while the merge is traced"):
        jax.jit(lambda b: sdjax.merge(b, EXPERTS, "linear", donate=earlier).params)(BASE)
    with pytest.raises(UserError, match="'scale' must be a finite number"):
        jax.jit(lambda s: sdjax.merge(BASE, EXPERTS, "ties", scale=s).params)(jnp.zeros(2))


def test_merge_in_trace_takes_weights_as_arguments_and_traces_each_shape_once():
    traces = []

    def blend(task_vectors, scale: float = 1.0):
        traces.append(scale)
        return scale * sum(task_vectors.values())

    merger, algorithm = sdjax.Merger(BASE, EXPERTS), Algorithm.from_function(blend)

    @jax.jit
    def merge(tensors, scale):
        return merger.merge_in_trace(algorithm.bind(scale=scale), tensors)

    expected = {s: merger(algorithm.bind(scale=s)).params for s in (0.3, 0.7)}
    traces.clear()
    shapes = {merger.tensors[path][1][0].shape for path in merger.paths}
    assert len(shapes) < len(merger.paths)
    for scale, params in expected.items():
        merged = merge(merger.tensors, scale)
        for path, tensor in ModelTree.of(params, "params").tensors.items():
            np.testing.assert_allclose(merged[path], tensor, rtol=1e-6)
    assert len(traces) == len(shapes)
    halved = jax.tree.map(lambda x: x / 2, dict(merger.tensors))
    for path, tensor in merge(halved, 0.7).items():
        np.testing.assert_allclose(2 * tensor, merged[path], rtol=1e-6)


def test_merge_in_trace_of_the_tree_form():
    def merge_trees(task_vectors, scale: float = 1.0):
        return {path: scale * vector for path, vector in task_vectors["expert_1"].items()}

    merger, algorithm = sdjax.Merger(BASE, EXPERTS), Algorithm.from_function(merge_trees)
    merged = jax.jit(lambda t, s: merger.merge_in_trace(algorithm.bind(scale=s), t))(
        merger.tensors, 0.5
    )
    expected = ModelTree.of(merger(algorithm.bind(scale=0.5)).params, "params").tensors
    for path in merger.paths:
        np.testing.assert_allclose(merged[path], expected[path], rtol=1e-6)
