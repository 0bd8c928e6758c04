"""Errors of merging by a recipe."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import SAME, TASK_ARITHMETIC, rewrite, write

from sdjax.core.errors import UserError
from sdjax.merging.engine import merge
from sdjax.merging.methods.registry import algorithm, methods
from sdjax.merging.recipe.pipeline import merge_recipe


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
    query = "model.layers.0.self_attn.q_proj.weight"  # layer 1 of the base has one
    rewrite(tmp_path / "code", models["code"], **{query: np.zeros((6, 4), np.float32)})
    check_refused(f"base lacks tensor {query}, which is in .*code")
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


# They share the check; the others run with the slow tests.
QUICK = ("linear", "magmax", "pcb", "sce", "ties")


@pytest.mark.parametrize(
    "method",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(methods())],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_method_hides_non_finite_weights(method, value, make_stats):
    rng = np.random.default_rng(0)
    base, good, bad = (rng.standard_normal((6, 8)).astype(np.float32) for _ in range(3))
    bad[1, 2] = value
    trees = [{"layers": {"0": {"mlp": {"up_proj": jnp.asarray(x)}}}} for x in (base, good, bad)]
    experts = trees[2:] if methods()[method].schema.max_models == 1 else trees[1:]
    stats = [make_stats(expert) for expert in experts]
    bound, key = algorithm(method), jax.random.key(0)
    assert not merge(trees[0], experts, bound, key=key, stats=stats).finite


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
            "num_hidden_layers must be an integer, not '2'",
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": True}, "architectures must be a list of names, not True"),
        ({"architectures": [["A"]]}, "architectures must be a list of names"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer, not '2'"),
        ({"text_config": {"num_layers": [2]}}, r"num_layers must be an integer, not \[2\]"),
    ],
)
def test_config_fields_of_a_wrong_type_are_refused(tmp_path, models, fields, message):
    config = {"model_type": "llama"} | fields
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"code/config.json: {message}"):
        merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")


def test_links_that_a_merge_does_not_need_lead_nowhere(tmp_path, models):
    for name, target in (("x.json", "missing"), ("y.json", "y.json")):
        (tmp_path / "code" / name).symlink_to(target)
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert not (tmp_path / "out" / "x.json").is_symlink()
    assert not (tmp_path / "out" / "y.json").is_symlink()
