from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.io.tensor_reader import TensorInfo
from sdjax.merging.recipe.recipe_method import find_method
from sdjax.merging.recipe.recipe_plan import plan_recipe
from sdjax.merging.recipe.recipe_reader import read_recipe
from sdjax.merging.recipe.source_models import SourceModel

TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 0.5
      density: 0.3
  - model: b
    parameters:
      weight: 1
parameters:
  normalize: false
  lambda: 0.8
dtype: bfloat16
out_dtype: float32
"""


def model(name):
    """Return a model of two layers without files."""
    if name == "gone":
        raise UserError("gone: no such folder")
    layers = (7 if name == "deep" else 2) * ((".mlp.up_proj.weight", ".self_attn.q_proj.weight"),)
    outside = ("model.embed_tokens.weight", "model.norm.weight")
    info = {name: TensorInfo((4, 4), np.dtype(ml_dtypes.bfloat16)) for name in outside}
    for index, suffixes in enumerate(layers):
        info |= {f"model.layers.{index}{s}": info[outside[0]] for s in suffixes}
    return SourceModel(
        name=name,
        folder=Path(name),
        reader=SimpleNamespace(folders=()),
        info=info,
        config={},
        outside=outside,
        layers=layers,
        prefix="model.layers.",
        tied=False,
    )


def load(tmp_path, text):
    path = tmp_path / "r.yml"
    path.write_text(text)
    recipe = read_recipe(path)
    method, _ = find_method(recipe, model)
    return plan_recipe(recipe, method, model)


def hyperparameters(plan, tensor="model.norm.weight"):
    (step,) = (step for step in plan.steps if step.name == tensor)
    return step.algorithm.hyperparameters


def test_ties_with_parameters_per_model(tmp_path):
    got = load(tmp_path, TIES)
    assert got.template.name == "base"
    assert len(got.steps) == 6
    for step in got.steps:
        assert step.sources[0].model.name == "base"
        assert [ref.model.name for ref in step.sources[1:]] == ["a", "b"]
        assert step.algorithm.hyperparameters == {
            "weight": (0.5, 1.0),
            "density": (0.3, 1.0),  # mergekit's default, not the paper's
            "scale": 0.8,
            "normalize": False,
            "elect": "weighted",
            "rescale": "none",
            "keep_ties": False,
        }
    assert {step.spec.dtype.name for step in got.steps} == {"float32"}


@pytest.mark.parametrize(
    ("parameters", "rescale"),
    [
        ("", "l1"),
        ("  rescale: density\n", "density"),
        ("  rescale: false\n", "none"),
        ("  rescale: true\n", "l1"),
    ],
)
def test_dare_rescales_as_mergekit_by_default(tmp_path, parameters, rescale):
    text = TIES.replace("ties", "dare_linear").replace("  normalize: false\n", parameters)
    assert hyperparameters(load(tmp_path, text))["rescale"] == rescale


def test_weights_that_sum_to_zero_cannot_be_normalized(tmp_path):
    text = """\
models:
  - {model: a, parameters: {weight: [{filter: norm, value: -1}, {value: 1}]}}
  - {model: b, parameters: {weight: 1}}
merge_method: linear
"""
    message = r"line 2: linear: .*'weight' sums to zero.* \(at model\.norm\.weight\)"
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)
    load(tmp_path, text + "parameters: {normalize: false}\n")


@pytest.mark.parametrize(("normalize", "problem"), [("false", "is zero"), ("true", "sums to zero")])
def test_weights_cannot_all_be_zero_without_a_base(tmp_path, normalize, problem):
    text = f"""\
models:
  - {{model: a, parameters: {{weight: [{{filter: norm, value: 0}}, {{value: 1}}]}}}}
  - {{model: b, parameters: {{weight: 0}}}}
merge_method: linear
parameters: {{normalize: {normalize}}}
"""
    with pytest.raises(UserError, match=f"'weight' {problem}.*change it") as caught:
        load(tmp_path, text)
    assert "false" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "dtype: bfloat16",
            "dtype: int4",
            "line 14: dtype must be one of bfloat16, float16, float32, float64",
        ),
        ("  - model: b\n", "  - model: b\n    weight: 1\n", "line 9: unknown key 'weight'"),
        (
            "      density",
            "      densty",
            "line 7: ties has no parameter 'densty' for a single model",
        ),
        ("  lambda", "  lamda", "line 13: ties has no parameter 'lamda' for the whole merge"),
        ("weight: 0.5", "weight: [0, x]", "line 6: weight: expected a number, found 'x'"),
        ("weight: 0.5", "weight: [{value: 1, fliter: x}]", "line 6: weight: unknown key 'fliter'"),
        ("weight: 0.5", "weight: [{filter: x}]", "line 6: .*must have the key 'value'"),
        ("weight: 0.5", "weight: much", "line 6: weight: expected a number, found 'much'"),
        (
            "density: 0.3",
            "density: 1.3",
            "line 7: density: expected a number from 0 to 1, found 1.3",
        ),
        (
            "      weight: 1\n",
            "      density: 1\n",
            "line 8: ties needs the parameter 'weight' for b",
        ),
        (
            "normalize: false",
            "rescale: much",
            "line 12: rescale: expected one of .*l1.*, found 'much'",
        ),
        (
            "normalize: false",
            "elect: null",
            "line 12: elect: expected one of .*plain.*, found nothing",
        ),
        ("normalize: false", "normalize: maybe", "line 12: normalize: expected true or false"),
        ("base_model: base\n", "", "line 1: ties needs base_model"),
        ("dtype: b", "revision: v2\ndtype: b", "line 14: unknown key 'revision'; write the model"),
        ("base_model: base\n", "base_model: gone\n", "line 2: gone: no such folder"),
        ("  - model: b", "  - model: gone", "line 8: gone: no such folder"),
        ("ties", "tiez", "line 1: no merge_method 'tiez'; did you mean ties"),
        ("merge_method: ties", "", "the key 'merge_method' is missing"),
        ("dtype: b", "slices: []\ndtype: b", "exactly one of models, slices and modules is needed"),
        (
            "dtype: b",
            "tokenizer: {tokens: {x: {force: true}}}\ndtype: b",
            "line 14: the token 'x' needs a source",
        ),
        (
            "dtype: b",
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\ndtype: b",
            "line 14: model_token needs model, and either token or token_id",
        ),
        (
            "  - model: b",
            "  - model: {path: b}",
            "line 8: unknown key 'path'; allowed: model, lora",
        ),
        ("  - model: b", "  - model: {lora: b}", "line 8: model as a mapping must have the key"),
        (
            "  - model: b",
            "  - model: {model: {}}",
            "line 8: model as a mapping must have .* 'path'",
        ),
        (
            "weight: 0.5",
            "weight: !foo 1",
            "line 6: values of type '!foo' are not supported; use a string",
        ),
        (
            "weight: 0.5",
            "weight: !!python/object:os.system x",
            "line 6: values of type 'python/object:os.system'",
        ),
        (
            "weight: 0.5",
            "weight: !!timestamp foo",
            "line 6: values of type 'timestamp' are not supported",
        ),
        ("weight: 0.5", "weight: =", "line 6: values of type 'value' are not supported"),
        ("weight: 0.5", "weight: <<", "line 6: values of type 'merge' are not supported"),
        ("weight: 0.5", "weight: !!bool maybe", "line 6: invalid value 'maybe'"),
        ("weight: 0.5", "weight: !!int ''", "line 6: invalid value ''"),
        ("weight: 0.5", "weight: {[1, 2]: 3}", "line 6: a key must be a string"),
        ("weight: 0.5", "weight: &a {value: *a}", "line 6: recursive alias"),
        ("weight: 0.5", "? [a]\n      : 1", "line 6: a key must be a string"),
        ("dtype: b", "? {a: 1}\n: 1\ndtype: b", "line 14: a key must be a string"),
        ("weight: 0.5", f"weight: 0x{5000 * 'F'}", "line 6: invalid value '0xFFF"),
        (
            "weight: 0.5",
            f"weight: {25 * '['}1{25 * ']'}",
            r"line 6: weight: expected a number, found \[{24}1\]",
        ),
        (
            "weight: 0.5",
            f"weight: {300 * '['}1{300 * ']'}",
            "line 6: nested too deeply or too large",
        ),
        (
            "weight: 0.5",
            f"weight: {500 * 'x'}",
            "line 6: weight: expected a number, found 'x{58}…$",
        ),
        ("  - model: b", "  - model: a", "line 8: a is listed twice"),
        (
            "  - model: b",
            "  - model: deep",
            "all sources must have the same number of layers: .* deep has 7",
        ),
        ("dtype: bfloat16", "dtype: torch.float8", "line 14: dtype must be one of"),
        (
            "dtype: b",
            "models: []\ndtype: b",
            "line 14: duplicate key 'models'",
        ),
        ("dtype: b", "dtype: [b", "line 15: not valid YAML"),
        (
            "out_dtype: float32\n",
            "---\nmodels: []\n",
            "not valid YAML: expected a single document in the stream, but",
        ),
    ],
)
def test_errors_name_the_key_and_the_line(tmp_path, old, new, message):
    assert old in TIES
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, TIES.replace(old, new, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("dtype: b", "name: x\ndtype: b", "line 14: the key 'name' means nothing; ignored"),
        ("dtype: b", "dtype: x\ndtype: b", "line 15: duplicate key 'dtype'; the last one counts"),
        ("dtype: b", "dype: b", "line 14: the key 'dype' means nothing (did you mean dtype?);"),
        ("weight: 0.5", "weight: 0.5\n      t: 1", "line 7: t: ties has no parameter 't' for"),
        ("  lambda", "  dtype: float32\n  lambda", "dtype: ties has no parameter"),
        (
            "  lambda",
            "  int_space: cs\n  lambda",
            "int_space: ties has no parameter 'int_space' for",
        ),
        (
            "weight: 0.5",
            "weight: 0.5\n      lambda: 2",
            "lambda: ties has no parameter 'lambda' for a",
        ),
        (
            "  - model: b\n",
            "  - model: b\n    glorious: 1\n",
            "line 9: the key 'glorious' means nothing",
        ),
        ("  - model: b\n", f"  - model: b\n    {500 * 'x'}: 1\n", "the key 'xxx"),
    ],
)
def test_keys_that_mean_nothing_give_a_note(tmp_path, old, new, note):
    assert old in TIES
    plain, changed = load(tmp_path, TIES), load(tmp_path, TIES.replace(old, new))
    assert hyperparameters(changed) == hyperparameters(plain)
    assert plain.notes == ()
    assert any(note in other for other in changed.notes), changed.notes


def test_range_of_layers_of_a_whole_model_must_be_all_of_them(tmp_path):
    recipe = "merge_method: karcher\nmodels:\n  - {model: a, layer_range: [0, %d]}\n  - model: b\n"
    assert len(load(tmp_path, recipe % 2).stacks[0]) == 2
    with pytest.raises(UserError, match=r"line 3: layer_range has no effect in models; use slices"):
        load(tmp_path, recipe % 1)


def test_merge_key_fills_in_missing_keys(tmp_path):
    each = TIES.replace("parameters:\n      weight: 0.5", "parameters: &one\n      weight: 0.5")
    each = each.replace("      weight: 1\n", "      <<: *one\n      weight: 1\n")
    values = hyperparameters(load(tmp_path, each))
    assert values["weight"] == (0.5, 1.0)
    assert values["density"] == (0.3, 0.3)
    with pytest.raises(UserError, match="line 10: the value of << must be a mapping"):
        load(tmp_path, each.replace("*one", "7"))


def test_merge_key_with_several_aliases(tmp_path):
    text = TIES.replace("parameters:\n      weight: 0.5", "parameters: &one\n      weight: 0.5")
    text = text.replace(
        "parameters:\n      weight: 1",
        "parameters: &two {<<: [{weight: 2}, *one]}\n  - model: c\n    parameters: *two",
    )
    values = hyperparameters(load(tmp_path, text))
    assert values["weight"] == (0.5, 2.0, 2.0)
    assert values["density"] == (0.3, 0.3, 0.3)


def test_nested_aliases_are_limited(tmp_path):
    nest = "&a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"
    for level in range(1, 9):
        nest = f"&a{level} [{nest}{f', *a{level - 1}' * 9}]"
    with pytest.raises(UserError, match="line 6: nested too deeply or too large"):
        load(tmp_path, TIES.replace("weight: 0.5", f"weight: {nest}"))


def test_model_as_a_mapping(tmp_path):
    written = "{model: {path: org/a, revision: v2}, lora: {path: b}}"
    text = TIES.replace("- model: a", f"- model: {written}")
    (step, *_) = load(tmp_path, text.replace("- model: b", "- model: {model: b}")).steps
    assert [ref.model.name for ref in step.sources[1:]] == ["org/a@v2+b", "b"]


def test_slerp_needs_two_models_and_t(tmp_path):
    text = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: a}]\n"
    with pytest.raises(UserError, match="slerp needs the parameter 't'"):
        load(tmp_path, text)
    got = load(tmp_path, text + "parameters: {t: 0.25}\n")
    step = got.steps[0]
    assert not step.has_base
    assert [one.model.name for one in step.sources] == ["a", "b"]  # base_model is where t is 0
    assert got.template.name == "a"
    with pytest.raises(UserError, match="slerp takes exactly 2 models, not 3"):
        load(tmp_path, text.replace("{model: b}", "{model: b}, {model: c}"))
    with pytest.raises(UserError, match="slerp needs base_model"):
        load(tmp_path, text.replace("base_model: a\n", ""))


SLICES = """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - model: deep
        layer_range: [3, 5]
        parameters: {weight: [0.5, {value: 2}]}
    parameters:
      normalize: true
  - base_model: deep
    sources:
      - {model: deep, layer_range: [6, 7]}
      - {model: base, layer_range: [1, 2]}
parameters:
  weight: [{filter: mlp, value: [1.0, 3.0]}, {value: 0.0}]
"""


def test_slices_stack_layers_and_use_the_innermost_parameter(tmp_path):
    got = load(tmp_path, SLICES.replace("[0.5, {value: 2}]", "[0.5, 2.5]"))
    assert len(got.stacks[0]) == 3
    by_name = {step.name: step for step in got.steps}
    assert next(iter(by_name)) == "model.embed_tokens.weight"
    up = [by_name[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    assert [step.sources[1].name for step in up] == [
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert [step.sources[0].model.name for step in up] == ["base", "base", "deep"]
    assert [step.path for step in up] == [f"layers/{i}/mlp/up_proj" for i in range(3)]
    values = [step.algorithm.hyperparameters for step in up]
    assert [one["weight"] for one in values] == [(0.5,), (2.5,), (3.0,)]
    assert [one["normalize"] for one in values] == [True, True, False]
    assert hyperparameters(got, "model.layers.2.self_attn.q_proj.weight")["weight"] == (0.0,)
    # The embedding belongs to the first slice, the final norm to the last one.
    assert by_name["model.embed_tokens.weight"].sources[0].model.name == "base"
    assert by_name["model.norm.weight"].sources[0].model.name == "deep"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "[0.5, {value: 2}]",
            "[0.5, {value: 2}]",
            "line 8: weight: every entry of a list with filters must have",
        ),
        (
            "layer_range: [3, 5]",
            "layer_range: [3, 6]",
            "line 4: all sources must have the same number",
        ),
        ("layer_range: [6, 7]", "layer_range: [6, 8]", "line 13: deep has 7 layers, not 8"),
        ("layer_range: [6, 7]", "layer_range: [7, 6]", "line 13: layer_range must be two integers"),
        (", layer_range: [6, 7]", "", "line 13: the key 'layer_range' is missing"),
        ("base_model: deep", "base_model: c", "line 11: base_model c is not among the sources"),
        ("base_model: deep", "base_modl: deep", "line 11: unknown key 'base_modl'; did you mean"),
        ("task_arithmetic", "passthrough", "passthrough takes exactly 1 model, not 2"),
        ("      normalize", "      nomalize", "line 10: .* has no parameter 'nomalize'"),
    ],
)
def test_errors_in_slices_name_the_line(tmp_path, old, new, message):
    assert old in SLICES
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, SLICES.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_modules_are_parts_of_the_models(tmp_path):
    text = (
        "merge_method: linear\nmodules:\n  {}:\n    models: [{{model: a}}, {{model: b}}]\n"
        "    parameters: {{weight: 2}}\n"
    )
    assert hyperparameters(load(tmp_path, text.format("default")))["weight"] == (2.0, 2.0)
    with pytest.raises(UserError, match="line 3: a has no part 'vision'; it has embed_tokens"):
        load(tmp_path, text.format("vision"))


def test_files_that_are_not_recipes_raise_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "none.yml")
    for text in ("", "- a\n", "just text"):
        with pytest.raises(UserError, match="must be a mapping"):
            load(tmp_path, text)
