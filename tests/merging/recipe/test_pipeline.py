import errno
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sdjax.core.errors import UserError
from sdjax.merging.engine import merge
from sdjax.merging.methods.registry import algorithm, methods
from sdjax.merging.recipe import pipeline
from sdjax.merging.recipe.source_models import tensor_path
from sdjax.models.tree import flatten, unflatten

SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.norm.weight": (4,),
}
SAME = "model.norm.weight"


@pytest.fixture
def models(tmp_path):
    """Write a base and two experts in bfloat16; return their tensors by model."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    out = {}
    for name, noise in [("base", 0.0), ("math", 0.1), ("code", 0.3)]:
        tensors = {
            n: (x + (0 if n == SAME else noise) * rng.standard_normal(x.shape)).astype(
                ml_dtypes.bfloat16
            )
            for n, x in base.items()
        }
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}))
        (folder / "tokenizer.json").write_text(f'"{name}"')
        (folder / "generation_config.json").write_text("{}")
        out[name] = tensors
    return out


def write(tmp_path, text):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return path


def read(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            out.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return out


def merge_recipe(recipe, out, **options):
    return pipeline.merge_recipe(recipe, out, **options)


def wide(x):
    return np.asarray(x, np.float64)


TASK_ARITHMETIC = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: math
    parameters:
      weight: 0.5
  - model: code
    parameters: {weight: -0.25}
parameters:
  int8_mask: true
  lambda: 2.0
dtype: float32
"""


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


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_streamed_random_merge_equals_one_in_memory(tmp_path, models, name):
    recipe = write(
        tmp_path,
        f"merge_method: {name}\nbase_model: base\nmodels:\n  - model: math\n  - model: code\n"
        "parameters:\n  weight: 0.7\n  density: 0.6\n  rescale: density\ndtype: bfloat16\n",
    )
    merge_recipe(recipe, tmp_path / "out", seed=3)
    merge_recipe(recipe, tmp_path / "sharded", seed=3, max_file_bytes=100)
    trees = [
        unflatten({tensor_path(n): jnp.asarray(x) for n, x in models[m].items()})
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
            np.testing.assert_array_equal(got, np.asarray(expected[tensor_path(tensor)]))
    merge_recipe(recipe, tmp_path / "other", seed=4)
    assert any(
        not np.array_equal(got, np.asarray(expected[tensor_path(tensor)]))
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


def rewrite(folder, tensors, **changes):
    save_file({**tensors, **changes}, folder / "model.safetensors")


def test_invalid_models_raise_user_error_and_leave_no_files(tmp_path, models):
    recipe = write(tmp_path, TASK_ARITHMETIC)
    name = "model.layers.1.mlp.up_proj.weight"

    def check_refused(message):
        with pytest.raises(UserError, match=message) as caught:
            merge_recipe(recipe, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    rewrite(tmp_path / "code", models["code"], **{name: np.zeros((4, 6), np.float32)})
    check_refused(rf"tensor {name} has shape \[4, 6\] in .*code, \[6, 4\] in .*base")
    rewrite(tmp_path / "code", {n: x for n, x in models["code"].items() if n != name})
    check_refused(f"code lacks tensor {name}, which is in .*base")
    rewrite(tmp_path / "code", models["code"], extra=np.zeros(3, np.float32))
    check_refused("code has tensor extra, which is not in .*base")
    broken = models["code"][name].copy()
    broken[0, 0] = np.nan
    rewrite(tmp_path / "code", models["code"], **{name: broken})
    check_refused(f"code: the tensor {name} contains NaN or infinity; copy the model again")
    file = tmp_path / "code" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    check_refused("code/model.safetensors: truncated or not a safetensors file")
    file.unlink()
    check_refused("code: no weights; model.safetensors")
    shutil.rmtree(tmp_path / "code")
    check_refused(f"code: no such model folder in {tmp_path}")


@pytest.mark.parametrize("method", sorted(methods()))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_method_hides_non_finite_weights(method, value):
    rng = np.random.default_rng(0)
    base, good, bad = (rng.standard_normal((6, 8)).astype(np.float32) for _ in range(3))
    bad[1, 2] = value
    trees = [{"layers": {"0": {"mlp": {"up_proj": jnp.asarray(x)}}}} for x in (base, good, bad)]
    experts = trees[2:] if method in ("arcee_fusion", "nearswap", "passthrough") else trees[1:]
    assert not merge(trees[0], experts, algorithm(method), key=jax.random.key(0)).finite


FAMILY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"model.layers.3.x": (2,)}, {}, r"has model.layers.3 but no model.layers.2; copy"),
        (
            {"model.layers.999999999.x": (2,)},
            {},
            r"has model.layers.999999999 but no model.layers.2;",
        ),
        ({}, {"num_hidden_layers": 5}, "has 2 layers, but num_hidden_layers in config.json is 5"),
        (
            {},
            {"num_hidden_layers": "2"},
            "has 2 layers, but num_hidden_layers in config.json is '2'",
        ),
        ({}, {"num_hidden_layers": 1}, "has 2 layers, but num_hidden_layers in config.json is 1"),
        ({}, FAMILY, "lacks tensor lm_head.weight, which every LlamaForCausalLM has"),
        (
            {},
            {**FAMILY, "tie_word_embeddings": True},
            "lacks tensor model.layers.0.input_layernorm.weight",
        ),
    ],
)
def test_incomplete_model_raises_user_error(tmp_path, models, change, config, message):
    more = {name: np.zeros(shape, np.float32) for name, shape in change.items()}
    for name in ("base", "math", "code"):
        rewrite(tmp_path / name, models[name], **more)
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name, **config}))
    with pytest.raises(UserError, match=message):
        merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")


def test_multi_token_prediction_layers_are_kept(tmp_path, models):
    for name in ("base", "math", "code"):
        config = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_adapter_on_a_tied_output_matrix_raises_user_error(tmp_path, models):
    embedding = models["base"]["model.embed_tokens.weight"]
    rewrite(tmp_path / "base", models["base"], **{"lm_head.weight": embedding})
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    shapes = {"lora_A": (2, 4), "lora_B": (11, 2)}
    factors = {
        f"base_model.model.lm_head.{one}.weight": np.ones(shape, np.float32)
        for one, shape in shapes.items()
    }
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    recipe = write(tmp_path, "merge_method: passthrough\nmodels:\n  - model: base+lora\n")
    with pytest.raises(UserError, match=r"lora: adapts lm_head.weight, which .*base ties"):
        merge_recipe(recipe, tmp_path / "out")


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


@pytest.mark.filterwarnings("error")
def test_merged_or_copied_non_finite_tensors_raise_user_error(tmp_path, models):
    large = {**models["base"], SAME: np.full(4, 1e30, ml_dtypes.bfloat16)}
    for name in ("base", "math", "code"):
        rewrite(tmp_path / name, large)
    recipe = write(tmp_path, TASK_ARITHMETIC)
    assert merge_recipe(recipe, tmp_path / "wide").unchanged == 5
    recipe = write(tmp_path, TASK_ARITHMETIC.replace("dtype: float32", "dtype: float16"))
    with pytest.raises(UserError, match=f"merged tensor {SAME} is not finite in float16"):
        merge_recipe(recipe, tmp_path / "narrow")
    for name in ("base", "math", "code"):
        rewrite(tmp_path / name, large, **{SAME: np.full(4, np.nan, np.float32)})
    with pytest.raises(UserError, match=f"base: the tensor {SAME} contains NaN"):
        merge_recipe(recipe, tmp_path / "nan")


def test_existing_output_is_kept(tmp_path, models):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_tensor_path_maps_hugging_face_names():
    assert tensor_path("model.layers.12.self_attn.q_proj.weight") == "layers/12/attn/q_proj"
    assert tensor_path("model.layers.0.input_layernorm.weight") == "layers/0/input_norm"
    assert tensor_path("lm_head.weight") == "lm_head"
    assert tensor_path("vision.patch.weight") == "vision.patch.weight"


class Stopped(Exception):
    """Raised in place of killing the process."""


def test_interrupted_merge_resumes(tmp_path, models):
    recipe = write(tmp_path, TASK_ARITHMETIC)
    uninterrupted = merge_recipe(recipe, tmp_path / "whole")

    def stop(done, total):
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        merge_recipe(recipe, tmp_path / "out", on_tensor=stop)
    assert not (tmp_path / "out").exists()
    again = []
    written = merge_recipe(recipe, tmp_path / "out", on_tensor=lambda *x: again.append(x))
    assert written.resumed >= 3
    assert again == [(done, 5) for done in range(written.resumed + 1, 6)]
    assert (uninterrupted.tensors, uninterrupted.resumed) == (5, 0)
    assert uninterrupted.bytes == written.bytes
    one, other = read(tmp_path / "whole"), read(tmp_path / "out")
    assert all(np.array_equal(one[name], other[name]) for name in SHAPES)


def test_full_disk_raises_user_error_and_the_merge_resumes(tmp_path, models):
    recipe = write(tmp_path, TASK_ARITHMETIC)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"out: cannot be written \(File too large\); free some space"
        ):
            merge_recipe(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / ".out.partial").exists()
    assert merge_recipe(recipe, tmp_path / "out").tensors == 5


def test_unreadable_weights_keep_the_written_tensors(tmp_path, models, monkeypatch):
    def raise_io_error(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    def stop(done, total):
        monkeypatch.setattr(os, "preadv", raise_io_error)

    monkeypatch.setattr("sdjax.merging.recipe.pipeline.QUEUE_SIZE", 0)
    recipe = write(tmp_path, TASK_ARITHMETIC)
    with pytest.raises(UserError, match=r"the tensor 'model.* cannot be read \(Input/output"):
        merge_recipe(recipe, tmp_path / "out", on_tensor=stop)
    monkeypatch.undo()
    assert merge_recipe(recipe, tmp_path / "out").resumed >= 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1e39", "line 10: weight: expected a number, found 1e\\+39"),
        ("1" + 400 * "0", "line 10: weight: expected a number"),
        ("1" + 5000 * "0", "line 10: invalid value '1000"),
        ("[" * 3000, "nested too deeply"),
        ("[{filter: mlp, valu: 0.3}]", "line 10: weight: unknown key 'valu'"),
    ],
)
def test_invalid_values_raise_user_error_in_one_line(tmp_path, models, value, message):
    text = TASK_ARITHMETIC.replace("{weight: -0.25}", f"\n      weight: {value}")
    with pytest.raises(UserError, match=message) as caught:
        merge_recipe(write(tmp_path, text), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_different_recipe_is_not_resumed(tmp_path, models):
    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out", on_tensor=stop)
    other = write(tmp_path, TASK_ARITHMETIC.replace("lambda: 2.0", "lambda: 1.0"))
    assert merge_recipe(other, tmp_path / "out").resumed == 0


@pytest.mark.parametrize("file", ["merges.txt", "chat_template.jinja", "tokenizer.model"])
def test_merge_with_a_changed_asset_is_not_resumed(tmp_path, models, file):
    def stop(done, total):
        raise Stopped

    (tmp_path / "base" / file).write_text("before")
    recipe = write(tmp_path, TASK_ARITHMETIC)
    with pytest.raises(Stopped):
        merge_recipe(recipe, tmp_path / "out", on_tensor=stop)
    (tmp_path / "base" / file).unlink()
    assert merge_recipe(recipe, tmp_path / "out").resumed == 0
    assert not (tmp_path / "out" / file).exists()


def test_each_distinct_program_is_compiled_once(tmp_path, models, monkeypatch):
    compiled = []

    def counted(lowered):
        compiled.append(lowered)
        return lowered.compile()

    monkeypatch.setattr("sdjax.merging.recipe.pipeline.compile_for_single_use", counted)
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert len(compiled) == len(set(SHAPES.values()))


def test_model_card_contains_the_recipe(tmp_path, models):
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith('---\nbase_model:\n- "base"\n- "math"\n- "code"\n')
    assert "# mine" in card
    assert TASK_ARITHMETIC.strip() in card


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


@pytest.mark.parametrize(
    ("file", "text", "choice", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer_source: union", "math/tokenizer.json: cannot be read"),
        ("tokenizer.json", b"{", "tokenizer_source: math", "math/tokenizer.json: cannot be read"),
        ("tokenizer.json", None, "tokenizer_source: union", "math: no tokenizer; copy tokenizer"),
        ("chat_template.jinja", b"\xff", "chat_template: auto", "chat_template.jinja: not UTF-8"),
    ],
)
def test_damaged_tokenizer_raises_user_error_before_the_merge(
    tmp_path, models, file, text, choice, message
):
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "u"}}
    for name in models:
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    if text is None:
        (tmp_path / "math" / file).unlink()
    else:
        (tmp_path / "math" / file).write_bytes(text)
    recipe = write(tmp_path, TASK_ARITHMETIC + choice + "\n")
    line = "recipe.yml, line 14: rows are matched" if "source" in choice else ""
    with pytest.raises(UserError, match=f"{line}.*{message}") as caught:
        merge_recipe(recipe, tmp_path / "out")
    assert len(str(caught.value)) < 500


def test_damaged_tokenizer_config_raises_user_error_before_the_merge(tmp_path, models):
    (tmp_path / "base" / "tokenizer_config.json").write_text("{")
    seen = []
    with pytest.raises(UserError, match=f"{tmp_path}/base/tokenizer_config.json: not valid JSON"):
        merge_recipe(
            write(tmp_path, TASK_ARITHMETIC + "chat_template: chatml\n"),
            tmp_path / "out",
            on_tensor=lambda *progress: seen.append(progress),
        )
    assert not seen


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_empty_tensor_is_copied(tmp_path, models, method):
    empty = np.zeros((0, 4), np.float32)
    for name, tensors in models.items():
        rewrite(tmp_path / name, tensors, empty=empty)
    text = f"merge_method: {method}\nmodels: [{{model: math}}, {{model: code}}]\n"
    text += "base_model: math\nparameters: {t: 0.5}\n" if method == "slerp" else ""
    merge_recipe(write(tmp_path, text), tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out")["empty"], empty)
