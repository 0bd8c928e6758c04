"""Merges of trees of other libraries, and of models under Hugging Face's names."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from safetensors.flax import load_file

import sdjax
from sdjax.core.errors import UserError
from sdjax.io.model_paths import model_folder
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
from sdjax.merging.recipe.model_card import Provenance
from sdjax.merging.scope import select_paths
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.sharding.mesh import make_mesh

Pair = collections.namedtuple("Pair", "kernel bias")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: jax.Array
    bias: jax.Array | None


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape or (3, 2)), jnp.float32)


TREES = {
    "a slash in a key": lambda s: {"net/~/a": {"w": array(s)}, "net/~/b": {"w": array(s + 1)}},
    "integer keys": lambda s: {"layers": {i: {"w": array(s + i)} for i in range(12)}},
    "lists": lambda s: {"layers": [{"w": array(s + i)} for i in range(12)]},
    "a tuple at the top": lambda s: (array(s), {"w": array(s + 1)}),
    "a named tuple": lambda s: {"dense": Pair(array(s), array(s + 1, 3))},
    "a dataclass": lambda s: [Dense(array(s), None), Dense(array(s + 1), array(s + 2, 3))],
    "a frozen dict": lambda s: freeze({"dense": {"w": array(s)}}),
    "an empty module": lambda s: {"dense": {"w": array(s)}, "relu": {}, "dropout": ()},
    "None": lambda s: {"dense": {"w": array(s), "bias": None}},
    "one path text twice": lambda s: {"a/b": array(s), "a": {"b": array(s + 1)}},
    "two spellings of one tensor": lambda s: {"embed": array(s), "model.embed_tokens": array(s)},
    "keys of other types": lambda s: {("a", 1): array(s), ("a", 2): array(s + 1)},
}


@pytest.mark.parametrize("tree", TREES)
def test_tree_comes_back_as_it_was(tree):
    a, b = (TREES[tree](seed) for seed in (0, 100))
    merged = sdjax.merge(a, [b], "task_arithmetic", weight=0.5)
    assert jax.tree.structure(merged.params) == jax.tree.structure(a)
    assert len(merged.merged) == len(jax.tree.leaves(a))
    assert merged.kept == ()
    expected = jax.tree.map(lambda x, y: 0.5 * (x + y), a, b)
    for got, want in zip(jax.tree.leaves(merged.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_experts_are_aligned_by_name():
    base = {"w": array(0), "b": array(1)}
    reversed_expert = nnx.State({"b": array(2), "w": array(3)})
    merged = sdjax.merge(base, [reversed_expert], lambda task_vectors: task_vectors["expert_1"])
    for name, seed in (("w", 3), ("b", 2)):
        np.testing.assert_allclose(merged.params[name], array(seed), atol=1e-6)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(12)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def test_every_block_of_an_nnx_module_gets_its_own_weights():
    (graph, a), (_, b) = (nnx.split(Stack(nnx.Rngs(seed))) for seed in (0, 1))

    def merge_models(task_vectors, depth):
        return depth * task_vectors["expert_1"]

    merged = sdjax.merge(a, [b], merge_models)
    module = nnx.merge(graph, merged.params)
    for i in range(12):
        first, second = (state["blocks"][i]["kernel"][...] for state in (a, b))
        expected = first + i / 11 * (second - first)
        np.testing.assert_allclose(module.blocks[i].kernel[...], expected, atol=1e-6)
    # The state of the random numbers is not floating point and stays the base's.
    assert merged.kept == ("dropout/rngs/count", "dropout/rngs/key")
    assert merged.params["dropout"]["rngs"]["key"] == a["dropout"]["rngs"]["key"]


def test_tensors_that_are_not_floats_stay_the_bases():
    base, expert = ({"w": array(seed), "step": jnp.int32(seed)} for seed in (3, 4))
    merged = sdjax.merge(base, [expert], "linear")
    assert merged.params["step"] is base["step"]
    assert (merged.merged, merged.kept) == (("w",), ("step",))
    # Without a base, the first expert's; an expert need not have it.
    soup = sdjax.merge(None, [base, {"w": expert["w"]}], "linear")
    assert soup.params["step"] is base["step"]
    with pytest.raises(UserError, match="scope 'step' matches no tensor"):
        sdjax.merge(base, [expert], "linear", scope="step")


def test_tensors_that_only_an_expert_has_are_left_out_with_a_warning(caplog):
    base, expert = {"w": array(0)}, {"w": array(1), "lm_head.weight": array(2)}
    assert sdjax.merge(base, [base, expert], "linear").params.keys() == {"w"}
    assert caplog.messages == [
        "expert_2: 1 of 2 tensors is left out, since the base does not have it: lm_head.weight"
    ]


def test_mesh_shards_hugging_face_names_like_paths(zoo):
    mesh = make_mesh({"fsdp": 1, "tensor": 1})
    config, params = sdjax.load_model("zoo:seed", mesh=mesh)
    merged = sdjax.merge(zoo["seed"], [zoo["reader"]], "linear", mesh=mesh)
    for path, spec in param_specs(config).items():
        assert merged.params[spec.hf_name].sharding == flatten(params)[path].sharding


def hugging_face(name):
    return load_file(model_folder(f"zoo:{name}") / "model.safetensors")


@pytest.fixture(scope="module")
def zoo():
    return {name: hugging_face(name) for name in ("seed", "reader", "calculator")}


def merge_models(task_vectors, depth):
    a, b = task_vectors["expert_1"], task_vectors["expert_2"]
    return jnp.where(a * b > 0, 0.6 * (a + b), (1 - depth) * a)


def random_by_kind(task_vectors, key, kind):
    a, b = task_vectors.values()
    keep = jax.random.bernoulli(key, 0.3 if kind == "mlp.down_proj" else 0.6, a.shape)
    return jnp.where(keep, a, b)


def merge_trees(task_vectors, key):
    first, second = task_vectors.values()
    noise = jax.random.normal(key, first["layers/0/mlp/up_proj"].shape)
    scale = jnp.mean(jnp.abs(noise)) / jnp.sqrt(sum(jnp.sum(x * x) for x in first.values()))
    return {path: scale * (first[path] + second[path]) for path in first}


@pytest.mark.parametrize("function", [merge_models, random_by_kind, merge_trees])
def test_hugging_face_names_give_the_tensors_of_the_command(zoo, tmp_path, function):
    key = jax.random.key(7)
    merged = sdjax.merge(zoo["seed"], [zoo["reader"], zoo["calculator"]], function, key=key)
    experts = {"expert_1": "zoo:reader", "expert_2": "zoo:calculator"}
    merge_algorithm(
        Algorithm.from_function(function),
        open_models("zoo:seed", experts, tmp_path),
        "all",
        tmp_path / "out",
        provenance=Provenance(method="mine", file="program.py", text=""),
        key=key,
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == merged.params.keys()
    changed = 0
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, merged.params[name])
        changed += not np.array_equal(tensor, zoo["seed"][name])
    assert changed >= 12  # the experts' MLPs


def test_both_spellings_draw_the_same_random_masks(zoo):
    trees = {name: sdjax.load_model(f"zoo:{name}")[1] for name in ("seed", "reader")}
    key, scope = jax.random.key(3), "layers/1/mlp/*"
    one = sdjax.merge(trees["seed"], [trees["reader"]], "dare_ties", key=key, scope=scope)
    two = sdjax.merge(zoo["seed"], [zoo["reader"]], "dare_ties", key=key, scope=scope)
    # The base's names decide; an expert may have the other ones.
    mixed = sdjax.merge(zoo["seed"], [trees["reader"]], "dare_ties", key=key, scope=scope)
    assert len(one.merged) == len(two.merged) == 3
    by_path, specs = flatten(one.params), param_specs(sdjax.load_model("zoo:seed")[0])
    for path in one.merged:
        name = specs[path].hf_name
        np.testing.assert_array_equal(by_path[path], two.params[name])
        np.testing.assert_array_equal(by_path[path], mixed.params[name])
        assert name in two.merged


def test_scopes_match_either_spelling():
    specs = param_specs(sdjax.load_model("zoo:seed")[0])
    names = {spec.hf_name: path for path, spec in specs.items()}
    for scope in (
        "mlp",
        "attention",
        "all",
        "*/mlp/down_proj",
        "*.mlp.down_proj.weight",
        "layers/1/*",
        "model.layers.1.*",
        ["embed", "model.norm.*"],
    ):
        assert {names[name] for name in select_paths(names, scope)} == set(
            select_paths(specs, scope)
        )
    gpt2 = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"]
    assert select_paths(gpt2, "mlp") == (gpt2[0],)
    assert select_paths(gpt2, "attention") == (gpt2[1],)


@pytest.mark.parametrize(
    "names",
    [
        "blocks/{}/kernel",
        "transformer.h.{}.mlp.c_fc.weight",
        "Block_{}/Dense_0/kernel",
        "model.layers.{}.mlp.up_proj.weight",
        "features.{}.weight",
    ],
)
def test_depth_is_known_for_every_naming_of_layers(names):
    trees = [{names.format(i): array(seed + i) for i in range(3)} for seed in (0, 9)]
    check_depths(trees, {names.format(i): i / 2 for i in range(3)})


def test_depth_of_lists_of_layers():
    trees = [[(array(seed + i), array(seed + i, 3)) for i in range(3)] for seed in (0, 9)]
    check_depths(trees, {f"{i}/{j}": i / 2 for i in range(3) for j in range(2)})
    trees = [{"net": [{"w": array(seed + i)} for i in range(3)]} for seed in (0, 9)]
    check_depths(trees, {f"net/{i}/w": i / 2 for i in range(3)})


def check_depths(trees, depths):
    def by_depth(task_vectors, depth):
        return 0 * task_vectors["expert_1"] + depth

    merged = sdjax.merge(trees[0], trees[1:], by_depth)
    changes = jax.tree.map(lambda new, old: new - old, merged.params, trees[0])
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(changes)
    }
    assert found.keys() == depths.keys()
    for path, depth in depths.items():
        np.testing.assert_allclose(found[path], depth, atol=1e-6)


def test_depth_is_refused_if_no_layer_is_recognized():
    def by_depth(task_vectors, depth):
        return depth * task_vectors["expert_1"]

    for make in (lambda s: {"Dense_0": {"kernel": array(s)}}, lambda s: (array(s), array(s + 1))):
        with pytest.raises(UserError, match="by_depth requests depth, but no tensor in scope is"):
            sdjax.merge(make(0), [make(9)], by_depth)
    # Tensors that are known to be outside the layers have depth -1.
    base, expert = ({"lm_head.weight": array(seed)} for seed in (0, 9))
    merged = sdjax.merge(base, [expert], by_depth)
    expected = 2 * base["lm_head.weight"] - expert["lm_head.weight"]
    np.testing.assert_allclose(merged.params["lm_head.weight"], expected, atol=1e-5)
