"""Results of merging by a recipe."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_models import SHAPES, TASK_ARITHMETIC, read, rewrite, wide, write

from sdjax.core.errors import UserError
from sdjax.merging.engine import merge
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.models.tensor_names import parse_name
from sdjax.models.tree import flatten, unflatten


def test_task_arithmetic_writes_a_complete_folder(tmp_path, models):
    seen = []
    written = merge_recipe(
        write(tmp_path, TASK_ARITHMETIC), tmp_path / "out", on_tensor=lambda *x: seen.append(x)
    )
    got = read(tmp_path / "out")
    assert got.keys() == SHAPES.keys()
    for name, tensor in got.items():
        b, m, c = (wide(models[model][name]) for model in ("base", "math", "code"))
        np.testing.assert_allclose(
            tensor, b + 2 * (0.5 * (m - b) - 0.25 * (c - b)), rtol=1e-5, atol=1e-6
        )
        assert tensor.dtype == np.float32
    assert (written.tensors, written.unchanged) == (5, 1)
    assert seen[-1] == (5, 5)
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "llama",
        "name": "base",
        "dtype": "float32",
    }
    assert (out / "tokenizer.json").read_text() == '"base"'
    assert (out / "recipe.yaml").read_text() == TASK_ARITHMETIC
    assert (out / "generation_config.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_linear_has_no_base_and_rounds_once(tmp_path, models):
    recipe = write(
        tmp_path,
        "merge_method: linear\nmodels:\n  - model: math\n  - model: code\n"
        "parameters:\n  weight: 3\n",
    )
    merge_recipe(recipe, tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        mean = (wide(models["math"][name]) + wide(models["code"][name])) / 2
        np.testing.assert_array_equal(tensor, mean.astype(np.float32).astype(ml_dtypes.bfloat16))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '"math"'


def test_slerp_starts_at_the_base_model(tmp_path, models):
    text = (
        "merge_method: slerp\nbase_model: code\nmodels:\n  - model: math\n  - model: code\n"
        "parameters:\n  t: {}\ndtype: float32\n"
    )
    for t, model in [(0, "code"), (1.0, "math")]:
        merge_recipe(write(tmp_path, text.format(t)), tmp_path / f"out{t}")
        for name, tensor in read(tmp_path / f"out{t}").items():
            np.testing.assert_allclose(tensor, wide(models[model][name]), rtol=1e-5, atol=1e-6)


SLOW = ("dare_linear", "dare_ties", "della_linear")


@pytest.mark.parametrize(
    "name", ["della", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_streamed_random_merge_equals_one_in_memory(tmp_path, models, name):
    recipe = write(
        tmp_path,
        f"merge_method: {name}\nbase_model: base\nmodels:\n  - model: math\n  - model: code\n"
        "parameters:\n  weight: 0.7\n  density: 0.6\n  rescale: density\ndtype: bfloat16\n",
    )
    merge_recipe(recipe, tmp_path / "out", seed=3)
    merge_recipe(recipe, tmp_path / "sharded", seed=3, max_file_bytes=100)
    trees = [
        unflatten({parse_name(n).path: jnp.asarray(x) for n, x in models[m].items()})
        for m in ("base", "math", "code")
    ]
    same = {"epsilon": 0.15} if name.startswith("della") else {}
    method = algorithm(name, weight=0.7, density=0.6, **same)
    key = jax.random.key(3)
    expected = flatten(merge(trees[0], trees[1:], method, scope="all", key=key).params)
    alone = "layers/1/mlp/up_proj"  # independent of what else is merged
    one = flatten(merge(trees[0], trees[1:], method, scope=alone, key=key).params)
    np.testing.assert_array_equal(one[alone], expected[alone])
    for folder in ("out", "sharded"):
        for tensor, got in read(tmp_path / folder).items():
            np.testing.assert_array_equal(got, np.asarray(expected[parse_name(tensor).path]))
    merge_recipe(recipe, tmp_path / "other", seed=4)
    assert any(
        not np.array_equal(got, np.asarray(expected[parse_name(tensor).path]))
        for tensor, got in read(tmp_path / "other").items()
    )


def test_sharded_result_has_an_index_and_can_be_merged(tmp_path, models):
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "one")
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "many", max_file_bytes=200)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2
    assert index["weight_map"].keys() == SHAPES.keys()
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert all(np.array_equal(one[name], many[name]) for name in SHAPES)
    again = "merge_method: linear\nmodels:\n  - model: many\n    parameters: {weight: 1}\n"
    merge_recipe(write(tmp_path, again), tmp_path / "again")
    assert all(np.array_equal(one[n], x) for n, x in read(tmp_path / "again").items())


def test_multi_token_prediction_layers_are_kept(tmp_path, models):
    for name in ("base", "math", "code"):
        config = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_config_has_the_dtype_of_the_tensors(tmp_path, models):
    rewrite(tmp_path / "math", {n: x.astype(np.float32) for n, x in models["math"].items()})
    for name in ("base", "math", "code"):
        (tmp_path / name / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    merge_recipe(write(tmp_path, TASK_ARITHMETIC.replace("dtype: float32", "")), tmp_path / "out")
    assert {x.dtype.name for x in read(tmp_path / "out").values()} == {"float32"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_per_layer_config_entries_are_stacked(tmp_path, models):
    fields = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "eos_token_id": [7, 8]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
    slices = "".join(
        f"  - sources: [{{model: base, layer_range: {part}}}]\n" for part in ("[0, 2]", "[1, 2]")
    )
    recipe = write(tmp_path, f"merge_method: passthrough\nslices:\n{slices}")
    merge_recipe(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "num_hidden_layers": 3,
        "layer_types": ["full", "sliding", "sliding"],
        "eos_token_id": [7, 8],
        "dtype": "bfloat16",
    }


def test_tensor_path_maps_hugging_face_names():
    assert parse_name("model.layers.12.self_attn.q_proj.weight").path == "layers/12/attn/q_proj"
    assert parse_name("model.layers.0.input_layernorm.weight").path == "layers/0/input_norm"
    assert parse_name("lm_head.weight").path == "lm_head"
    assert parse_name("vision.patch.weight").path == "vision/patch/weight"


def test_each_distinct_program_is_compiled_once(tmp_path, models, monkeypatch):
    compiled = []

    def counted(lowered):
        compiled.append(lowered)
        return lowered.compile()

    monkeypatch.setattr("sdjax.merging.recipe.pipeline.compile_for_single_use", counted)
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert len(compiled) == len(set(SHAPES.values()))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("chatml", "<|im_start|>"),
        ("auto", "one way"),
        ('"{{ messages }}"', "{{ messages }}"),
    ],
)
def test_chat_template_by_name_majority_or_literal(tmp_path, models, choice, expected):
    for name in ("base", "math", "code"):
        template = "another" if name == "base" else "one way"
        settings = {"chat_template": template, "bos_token": "<s>"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = write(tmp_path, TASK_ARITHMETIC + f"chat_template: {choice}\n")
    merge_recipe(recipe, tmp_path / "out")
    assert expected in (tmp_path / "out" / "chat_template.jinja").read_text()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings == {"bos_token": "<s>"}
    wrong = write(tmp_path, TASK_ARITHMETIC + "chat_template: chatnl\n")
    with pytest.raises(UserError, match="line 14: no chat_template 'chatnl'; use auto"):
        merge_recipe(wrong, tmp_path / "other")


def test_default_of_several_chat_templates_is_used(tmp_path, models):
    named = [{"name": "tools", "template": "other"}, {"name": "default", "template": "its own"}]
    settings = json.dumps({"chat_template": named})
    (tmp_path / "base" / "tokenizer_config.json").write_text(settings)
    merge_recipe(write(tmp_path, TASK_ARITHMETIC + "chat_template: auto\n"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "its own"


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_empty_tensor_is_copied(tmp_path, models, method):
    empty = np.zeros((0, 4), np.float32)
    for name, tensors in models.items():
        rewrite(tmp_path / name, tensors, empty=empty)
    text = f"merge_method: {method}\nmodels: [{{model: math}}, {{model: code}}]\n"
    text += "base_model: math\nparameters: {t: 0.5}\n" if method == "slerp" else ""
    merge_recipe(write(tmp_path, text), tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out")["empty"], empty)


def test_published_evidence_against_a_method_is_a_note(tmp_path, models):
    recipe = write(
        tmp_path,
        "merge_method: iso_c\nbase_model: base\nmodels: [{model: math}, {model: code}]\n",
    )
    notes = merge_recipe(recipe, tmp_path / "out").notes
    assert any(note.startswith("iso_c: in a comparison of six methods on four") for note in notes)
