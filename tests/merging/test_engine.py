import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm, PerExpert
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger, merge
from sdjax.merging.tensor_program import tensor_key_data
from sdjax.models.tree import flatten


def weighted(task_vectors, weight: PerExpert = 1.0, scale: float = 1.0):
    return scale * sum(weight[name] * vector for name, vector in task_vectors.items())


def reference(base, experts, combine):
    """Return path to (base, task vectors, merged task vector) of the MLP tensors, in float64."""
    leaves, others = flatten(base), [flatten(expert) for expert in experts]
    out = {}
    for path in leaves:
        if "/mlp/" in path:
            at = np.asarray(leaves[path], np.float64)
            vectors = [np.asarray(other[path], np.float64) - at for other in others]
            out[path] = (at, vectors, combine(path, vectors))
    return out


def test_merge_adds_the_merged_task_vector_in_scope(base, experts):
    algorithm = Algorithm.from_function(weighted, weight=(0.5, 0.2, -1.0))
    merged = merge(base, experts, algorithm, scope="mlp")
    expected = reference(base, experts, lambda _, v: 0.5 * v[0] + 0.2 * v[1] - v[2])
    got = flatten(merged.params)
    for path, (at, _, vector) in expected.items():
        np.testing.assert_allclose(got[path], at + vector, rtol=1e-5, atol=1e-6)
    untouched = {path: leaf for path, leaf in flatten(base).items() if path not in expected}
    assert all(got[path] is leaf for path, leaf in untouched.items())
    assert (merged.merged, merged.kept) == (tuple(sorted(expected)), tuple(sorted(untouched)))
    assert repr(merged).startswith("MergedModel(9 of 13 tensors merged, finite=True, change=")
    norm = np.sqrt(sum(np.sum(m**2) for _, _, m in expected.values()))
    norms = [np.sqrt(sum(np.sum(v[j] ** 2) for _, v, _ in expected.values())) for j in range(3)]
    assert merged.finite
    assert merged.change == pytest.approx(norm / np.mean(norms), rel=1e-5)


def test_sweeps_and_new_experts_do_not_recompile(base, experts, make_tree, compilations):
    cache = CompileCache()
    algorithm = Algorithm.from_function(weighted)
    merger = Merger(base, experts, compile_cache=cache)
    merger(algorithm)
    assert cache.compiled == 4  # one per shape
    others = [make_tree(seed, near=base) for seed in (7, 8, 9)]
    before = compilations.count
    changes = [merger(algorithm.bind(scale=s)).change for s in (0.1, 0.2, 0.4)]
    assert changes[2] == pytest.approx(4 * changes[0], rel=1e-5)
    merger(algorithm.bind(weight=(1.0, 0.0, 2.0)))
    Merger(base, others, compile_cache=cache)(algorithm)
    Merger(base, experts, compile_cache=cache)(Algorithm.from_function(weighted, scale=3.0))
    assert cache.compiled == 4
    assert compilations.count == before
    merger(Algorithm.from_function(lambda task_vectors: task_vectors["expert_2"]))
    assert compilations.count == before + 4  # shows that the listener counts


def test_kind_needs_one_executable_per_kind(base, experts):
    def by_kind(task_vectors, kind):
        return task_vectors["expert_1"] * (2.0 if kind == "mlp.down_proj" else 0.0)

    cache = CompileCache()
    got = flatten(
        merge(
            base, experts, Algorithm.from_function(by_kind), scope="mlp", compile_cache=cache
        ).params
    )
    assert cache.compiled == 3  # gate_proj and up_proj share a shape but not a kind
    for path, (at, vectors, _) in reference(base, experts, lambda *_: None).items():
        factor = 2.0 if path.endswith("down_proj") else 0.0
        np.testing.assert_allclose(got[path], at + factor * vectors[0], rtol=1e-5, atol=1e-6)


def test_depth_is_the_position_of_the_layer(base, experts):
    def by_depth(task_vectors, depth):
        return task_vectors["expert_1"] * 0 + depth

    got = flatten(
        merge(base, experts, Algorithm.from_function(by_depth), scope=["*/mlp/*", "embed"]).params
    )
    leaves = flatten(base)
    for path, depth in [("layers/0/mlp/up_proj", 0.0), ("layers/1/mlp/up_proj", 0.5)]:
        np.testing.assert_allclose(got[path] - leaves[path], depth, atol=1e-6)
    # The experts' embeddings differ from the base's here, so this tensor is merged too.
    np.testing.assert_allclose(got["embed"] - leaves["embed"], -1.0, atol=1e-6)


def test_python_branch_on_depth_raises_with_a_remedy(base, experts):
    def branching(task_vectors, depth):
        return task_vectors["expert_1"] if depth < 0.5 else task_vectors["expert_2"]

    with pytest.raises(UserError, match=r"jnp.where\(depth < 0.5, a, b\)"):
        merge(base, experts, Algorithm.from_function(branching))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda task_vectors: task_vectors["expert_1"].T,
            r"shape \[4, 6\] for .*not float32\[6, 4\]",
        ),
        (lambda task_vectors: jnp.sum(task_vectors["expert_1"]), r"not float32\[\]"),
        (lambda task_vectors: task_vectors, "not a dict with 3 entries"),
        (lambda task_vectors: None, "not NoneType"),
        (lambda task_vectors: task_vectors["math"], "KeyError: 'math'; the experts are "),
        (lambda task_vectors: task_vectors["expert_1"] * 1j, "one real array"),
    ],
)
def test_invalid_result_raises_user_error_in_one_line(base, experts, function, message):
    with pytest.raises(UserError, match=message) as caught:
        merge(base, experts, Algorithm.from_function(function), scope="mlp")
    assert "\n" not in str(caught.value)


def test_arithmetic_is_float32_with_one_rounding(make_tree):
    base = make_tree(0, dtype=jnp.bfloat16)
    experts = [make_tree(seed, near=base, dtype=jnp.bfloat16) for seed in (1, 2, 3)]
    got = flatten(merge(base, experts, Algorithm.from_function(weighted, weight=0.37)).params)
    for path, (at, _, vector) in reference(base, experts, lambda _, v: 0.37 * sum(v)).items():
        assert got[path].dtype == jnp.bfloat16
        once = jnp.asarray(at + vector, jnp.bfloat16)
        # With one rounding, only float32 errors across a rounding boundary can make a difference.
        assert np.mean(np.asarray(got[path] != once)) < 0.05


def test_unchanged_tensors_are_not_merged(base, experts):
    same = "layers/1/mlp/up_proj"
    for expert in experts:
        expert["layers"]["1"]["mlp"]["up_proj"] = base["layers"]["1"]["mlp"]["up_proj"]

    def noise(task_vectors):
        return task_vectors["expert_1"] * 0 + 1.0

    def merge_trees(task_vectors):
        return {path: leaf * 0 + 1.0 for path, leaf in task_vectors["expert_1"].items()}

    for function in (noise, merge_trees):
        got = flatten(merge(base, experts, Algorithm.from_function(function)).params)
        leaves = flatten(base)
        assert got[same] is leaves[same]
        other = "layers/1/mlp/down_proj"
        np.testing.assert_allclose(got[other], leaves[other] + 1.0, rtol=1e-6)


def test_experts_equal_to_the_base_give_the_base(base):
    merged = merge(base, [base, base], Algorithm.from_function(weighted))
    assert merged.finite
    assert merged.change == 0.0
    assert all(
        a is b for a, b in zip(flatten(base).values(), flatten(merged.params).values(), strict=True)
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_results_are_flagged(base, experts, bad):
    def poisoned(task_vectors):
        return task_vectors["expert_1"].at[0, 0].set(bad)

    merged = merge(base, experts, Algorithm.from_function(poisoned))
    assert not merged.finite
    assert not np.isfinite(merged.change)


def test_overflow_of_the_stored_dtype_is_not_finite(make_tree):
    base = make_tree(0, dtype=jnp.float16)
    experts = [make_tree(1, near=base, dtype=jnp.float16)]
    assert merge(base, experts, Algorithm.from_function(weighted)).finite
    assert not merge(base, experts, Algorithm.from_function(weighted, scale=1e5)).finite


def test_tree_form_sees_all_tensors(base, experts):
    def merge_trees(task_vectors, base, strength: float = 1.0):
        total = sum(jnp.sum(leaf**2) for leaf in task_vectors["expert_2"].values())
        return {
            path: strength * leaf / jnp.sqrt(total) + 0 * base[path]
            for path, leaf in task_vectors["expert_2"].items()
        }

    merged = merge(base, experts, Algorithm.from_function(merge_trees, strength=3.0), scope="mlp")
    total = sum(np.sum(v[1] ** 2) for _, v, _ in reference(base, experts, lambda *_: 0).values())
    expected = reference(base, experts, lambda _, v: 3.0 * v[1] / np.sqrt(total))
    got = flatten(merged.params)
    for path, (at, _, vector) in expected.items():
        np.testing.assert_allclose(got[path], at + vector, rtol=1e-5, atol=1e-6)

    def incomplete(task_vectors):
        return {"embed": jnp.zeros(3)}

    incomplete.__name__ = "merge_trees"
    with pytest.raises(UserError, match="the same paths as its input"):
        merge(base, experts, Algorithm.from_function(incomplete))


def test_without_a_base_the_task_vectors_are_the_weights(experts):
    merged = merge(None, experts, Algorithm.from_function(weighted, weight=1 / 3))
    got = flatten(merged.params)
    flat = [flatten(expert) for expert in experts]
    for path in (p for p in flat[0] if "/mlp/" in p):
        mean = np.mean([np.asarray(f[path], np.float64) for f in flat], axis=0)
        np.testing.assert_allclose(got[path], mean, rtol=1e-5, atol=1e-6)


def test_tensor_keys_depend_on_key_and_path_only(base, experts, make_tree):
    def noisy(task_vectors, key):
        return jax.random.normal(key, task_vectors["expert_1"].shape)

    algorithm = Algorithm.from_function(noisy)

    def run(base, experts, seed, scope="mlp"):
        return flatten(
            merge(base, experts, algorithm, key=jax.random.key(seed), scope=scope).params
        )

    leaves, first = flatten(base), run(base, experts, 0)
    alone = run(base, experts, 0, scope="layers/2/mlp/up_proj")
    path = "layers/2/mlp/up_proj"
    np.testing.assert_array_equal(first[path], alone[path])
    assert not np.allclose(first[path], run(base, experts, 1)[path])
    other = "layers/1/mlp/up_proj"
    assert not np.allclose(first[path] - leaves[path], first[other] - leaves[other])
    with pytest.raises(UserError, match="pass a key such as"):
        merge(base, experts, algorithm)


def test_tensor_key_data_is_stable():
    # Stored results depend on this hash.
    data = tensor_key_data(jax.random.key(0), "layers/0/mlp/up_proj")
    np.testing.assert_array_equal(data, np.array([2189619214, 3671122234], np.uint32))


def test_executables_are_bounded_and_freed(base, experts):
    cache = CompileCache(capacity=4)
    merger = Merger(base, experts, scope="mlp", compile_cache=cache)
    functions = []
    for scale in range(1, 6):

        def candidate(task_vectors, scale=int(scale)):
            return scale * task_vectors["expert_1"]

        functions.append(weakref.ref(candidate))
        merger(Algorithm.from_function(candidate))
        del candidate
    gc.collect()
    assert cache.compiled == 10
    assert len(cache) == 4
    assert functions[0]() is None


def test_quick_executables_give_the_same_result(base, experts):
    algorithm = Algorithm.from_function(weighted, weight=0.3)
    slow = flatten(merge(base, experts, algorithm).params)
    quick = flatten(merge(base, experts, algorithm, compile_cache=CompileCache(quick=True)).params)
    for path in slow:
        np.testing.assert_allclose(slow[path], quick[path], rtol=1e-6, atol=1e-6)


def test_mismatched_models_raise_user_error(base, experts):
    algorithm = Algorithm.from_function(weighted)
    experts[1]["layers"]["0"]["mlp"]["up_proj"] = jnp.zeros((4, 6))
    with pytest.raises(
        UserError, match=r"'layers/0/mlp/up_proj': expert_2 has shape \[4, 6\], the base \[6, 4\]"
    ):
        merge(base, experts, algorithm)
    del experts[1]["layers"]["0"]["mlp"]["up_proj"]
    with pytest.raises(UserError, match="expert_2 has no tensor 'layers/0/mlp/up_proj'"):
        merge(base, experts, algorithm)
    with pytest.raises(UserError, match="at least one expert"):
        merge(base, [], algorithm)
    with pytest.raises(UserError, match="called with an Algorithm, not 'ties'; use sdjax"):
        Merger(base, experts, scope="embed")("ties")
    with pytest.raises(UserError, match="distinct names"):
        merge(base, experts, algorithm, slots=("a", "a", "b"))
