"""In-memory merging with `sdjax.merge`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.core.errors import UserError
from sdjax.merging.merged_model import MergedModel
from sdjax.merging.methods.registry import algorithm, methods
from sdjax.models.tree import flatten

SHAPES = {"mlp/up_proj": (12, 8), "mlp/down_proj": (8, 12), "attn/q_proj": (8, 8)}


def tree(seed, layers=2):
    rng = np.random.default_rng(seed)
    out = {"layers": {}}
    for layer in range(layers):
        parts: dict = {}
        for name, shape in SHAPES.items():
            room, leaf = name.split("/")
            parts.setdefault(room, {})[leaf] = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        out["layers"][str(layer)] = parts
    return out


def test_merge_takes_a_name_a_function_and_named_experts():
    base, a, b = tree(0), tree(1), tree(2)
    merged = sdjax.merge(base, [a, b], "task_arithmetic", scope="mlp", weight=0.5)
    one, two, at, got = (flatten(x) for x in (a, b, base, merged.params))
    for path, leaf in at.items():
        want = 0.5 * (one[path] + two[path]) if "/mlp/" in path else leaf
        np.testing.assert_allclose(got[path], want, rtol=1e-5, atol=1e-6)
    assert merged.finite

    def scaled_math(task_vectors, strength: float = 1.0):
        return strength * task_vectors["math"]

    named = sdjax.merge(base, {"math": a, "code": b}, scaled_math, strength=0.25)
    for path, leaf in flatten(named.params).items():
        want = at[path] + 0.25 * (one[path] - at[path])
        np.testing.assert_allclose(leaf, want, rtol=1e-5, atol=1e-6)
    soup = sdjax.merge(None, [a, b], "linear", weight=(1.0, 3.0))
    path = "layers/0/mlp/up_proj"
    want = (one[path] + 3 * two[path]) / 4
    np.testing.assert_allclose(flatten(soup.params)[path], want, rtol=1e-5)
    with pytest.raises(UserError, match="no merge method 'tie'; did you mean ties"):
        sdjax.merge(base, [a], "tie")
    with pytest.raises(UserError, match="no hyperparameter 'sclae'; did you mean scale"):
        sdjax.merge(base, [a], "ties", sclae=1.0)


def test_sweep_over_coefficients_does_not_recompile(compilations):
    base, experts = tree(0), [tree(1), tree(2)]
    sdjax.merge(base, experts, "ties", density=0.5)
    before = compilations.count
    for step in range(12):
        sdjax.merge(base, experts, "ties", density=0.08 * (step + 1), scale=0.1 * step)
    assert compilations.count == before
    sdjax.merge(base, experts, "ties", elect="plain")  # a static one does: one executable per shape
    assert compilations.count == before + 3


def test_redefined_function_is_compiled_again(compilations):
    base, expert = tree(0), tree(1)
    path = "layers/0/mlp/up_proj"
    delta = flatten(expert)[path] - flatten(base)[path]
    for factor in (1, 100):
        cell: dict = {"__name__": "__main__"}
        exec(f"def merge_models(vectors): return {factor} * vectors['expert_1']", cell)
        counts = []
        for _ in range(2):
            before = compilations.count
            merged = sdjax.merge(base, [expert], cell["merge_models"], scope=path)
            counts.append(compilations.count - before)
            change = flatten(merged.params)[path] - flatten(base)[path]
            np.testing.assert_allclose(change, factor * delta, rtol=1e-4, atol=1e-5)
        assert counts[1] == 0


def test_80_layers_need_as_many_executables_as_8(compilations):
    counts = []
    for layers in (8, 80):
        jax.clear_caches()
        base, expert = tree(0, layers), tree(1, layers)
        merger = sdjax.Merger(base, [expert])
        before = compilations.count
        merger(algorithm("magmax"))
        counts.append(compilations.count - before)
    assert counts == [3, 3]  # one per shape


def test_donated_result_gives_up_its_buffers():
    base, experts = tree(0), [tree(1), tree(2)]
    merger = sdjax.Merger(base, experts)
    method = algorithm
    first = merger(method("task_arithmetic", weight=0.5))
    path = "layers/1/mlp/up_proj"
    place = flatten(first.params)[path].unsafe_buffer_pointer()
    second = merger(method("task_arithmetic", weight=0.25), donate=first)
    assert flatten(second.params)[path].unsafe_buffer_pointer() == place
    assert flatten(first.params)[path].is_deleted()
    assert not flatten(base)[path].is_deleted()
    fresh = merger(method("task_arithmetic", weight=0.25))
    for path, leaf in flatten(fresh.params).items():
        np.testing.assert_array_equal(leaf, flatten(second.params)[path])
    same = MergedModel(params=base, finite=True, change=0.0, merged=(), kept=())
    with pytest.raises(UserError, match="is not a merged tensor"):
        merger(method("magmax"), donate=same)
    with pytest.raises(UserError, match="were donated before"):
        merger(method("magmax"), donate=first)


def test_invalid_arguments_raise_user_error():
    base, expert = tree(0), tree(1)
    for experts in ({"math": 1.0}, [None]):
        with pytest.raises(
            UserError, match=r"must be a pytree of arrays, such as a nested dict, not"
        ):
            sdjax.merge(base, experts, "linear")
    with pytest.raises(UserError, match=r"the base must be a pytree .*, not 'zoo:seed'"):
        sdjax.merge("zoo:seed", [expert], "linear")
    with pytest.raises(
        UserError, match="expert_1: 'layers/0/mlp/down_proj/0' must be an array, not float"
    ):
        sdjax.merge(base, [{"layers": {"0": {"mlp": {"down_proj": [1.0]}}}}], "linear")
    with pytest.raises(
        UserError, match="experts must be a list of trees or trees by name, not None"
    ):
        sdjax.merge(base, None, "linear")
    with pytest.raises(UserError, match="method must be a name, a function or an Algorithm, not 5"):
        sdjax.merge(base, [expert], 5)
    with pytest.raises(
        UserError, match="scope must be all, mlp, attention or glob patterns, not 3"
    ):
        sdjax.merge(base, [expert], "linear", scope=3)
    with pytest.raises(UserError, match=r"dare_ties draws .*; pass a key such as jax.random.key"):
        sdjax.merge(base, [expert], "dare_ties")
    for key, found in [
        (0, "0"),
        (np.zeros(2, np.uint32), r"an array uint32\[2\]"),
        (jax.random.split(jax.random.key(0)), r"an array key<fry>\[2\]"),
    ]:
        with pytest.raises(UserError, match=f"key must be one typed PRNG key .*, not {found}"):
            sdjax.merge(base, [expert], "dare_ties", key=key)
    smaller = sdjax.merge(tree(0, layers=1), [tree(1, layers=1)], "linear")
    with pytest.raises(UserError, match="donate: no layers/1/attn/q_proj of this shape"):
        sdjax.merge(base, [expert], "linear", donate=smaller)
    with pytest.raises(UserError, match="donate must be an earlier result, not dict"):
        sdjax.merge(base, [expert], "linear", donate=smaller.params)
    for dtype in (np.complex64, np.int32, np.bool_):
        other = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), expert)
        with pytest.raises(UserError, match=f"{np.dtype(dtype).name} cannot be merged; use floats"):
            sdjax.merge(base, [other], "linear")


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), pytest.param((1,), marks=pytest.mark.slow)])
def test_every_method_accepts_scalars_and_empty_tensors(name, shape, make_stats):
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    base, *experts = ({"layers/0/x": array} for array in arrays)
    one, schema = methods()[name], methods()[name].schema
    hyperparameters = {"t": 0.5} if "t" in schema.required else {}
    merged = sdjax.merge(
        base,
        experts[: schema.max_models],
        one.name,
        key=jax.random.key(0),
        stats=[make_stats({**expert, "x": np.eye(3)}) for expert in experts[: schema.max_models]],
        **hyperparameters,
    )
    assert merged.params["layers/0/x"].shape == shape
    assert merged.finite


def test_import_sdjax_does_not_import_jax():
    code = (
        "import sys, sdjax; print('jax' in sys.modules); sdjax.merge; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("method", ["linear", "multislerp", "task_arithmetic"])
def test_zero_weights_without_a_base_are_an_error(method):
    base, a, b = tree(0), tree(1), tree(2)
    for weight in (0, [0, 0]):
        with pytest.raises(UserError, match=f"{method}: .*'weight' is zero .*without a base"):
            sdjax.merge(None, [a, b], method, weight=weight, normalize=False)
        merged = flatten(sdjax.merge(base, [a, b], method, weight=weight, normalize=False).params)
        for path, leaf in flatten(base).items():
            np.testing.assert_array_equal(merged[path], leaf)


def test_a_tree_in_place_of_a_list_of_experts_is_recognized():
    base, expert = tree(0), tree(1)
    for reference, one in ((base, expert), (flatten(base), flatten(expert)), (None, flatten(base))):
        with pytest.raises(UserError, match=r"this is one tree; .* pass \[expert\]"):
            sdjax.merge(reference, one, "linear")
    assert sdjax.merge(base, {"layers_expert": expert}, "linear").finite
