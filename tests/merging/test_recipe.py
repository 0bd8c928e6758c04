import pytest

from sdjax.errors import UserError
from sdjax.merging.recipe import plan, read_recipe

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


def load(tmp_path, text):
    path = tmp_path / "r.yml"
    path.write_text(text)
    return plan(read_recipe(path))


def test_ties_with_values_for_each_model(tmp_path):
    got = load(tmp_path, TIES)
    assert got.base == got.template == "base"
    assert got.experts == ("a", "b")
    assert got.dtype == "float32"
    assert got.algorithm.hyperparameters == {
        "weight": (0.5, 1.0),
        "density": (0.3, 1.0),  # mergekit's default, not the paper's
        "scale": 0.8,
        "normalize": False,
        "elect": "weighted",
        "rescale": "none",
    }


@pytest.mark.parametrize(
    ("parameters", "rescale"),
    [
        ("", "l1"),
        ("  rescale_norm: density\n", "density"),
        ("  rescale: false\n", "none"),
        ("  rescale: true\n", "l1"),
    ],
)
def test_dare_rescales_as_mergekit_unless_told(tmp_path, parameters, rescale):
    text = TIES.replace("ties", "dare_linear").replace("  normalize: false\n", parameters)
    assert load(tmp_path, text).algorithm.hyperparameters["rescale"] == rescale


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dtype: bf", "dtpe: bf", r"r.yml, line 14: unknown key 'dtpe'; allowed: merge_method,"),
        (
            "dtype: bfloat16",
            "dtype: int4",
            "line 14: dtype must be one of bfloat16, float16, float32",
        ),
        ("  - model: b\n", "  - model: b\n    weight: 1\n", "line 9: unknown key 'weight'"),
        ("      density", "      densty", "line 7: ties has no parameter 'densty' for one model"),
        ("  lambda", "  lamda", "line 13: ties has no parameter 'lamda' for the whole merge"),
        ("weight: 0.5", "weight: [0, 1]", "line 6: expected number, found a list .a gradient"),
        ("weight: 0.5", "weight: much", "line 6: expected number, found 'much'"),
        ("      weight: 1\n", "      density: 1\n", "ties needs the parameter 'weight' for b"),
        ("normalize: false", "normalize: maybe", "line 12: expected true or false"),
        ("base_model: base\n", "", "ties needs base_model"),
        ("ties", "tiez", "line 1: no merge_method 'tiez'; there are: linear"),
        ("merge_method: ties", "", "the key 'merge_method' is missing"),
        ("dtype: b", "slices: []\ndtype: b", "line 14: 'slices' is not supported yet"),
        (
            "dtype: b",
            "base_model: x\ndtype: b",
            "line 14: the key 'base_model' stands here a second",
        ),
        ("models:\n", "models: x\nrest:\n", "line 4: unknown key 'rest'"),
        ("dtype: b", "dtype: [b", "no single YAML document"),
        ("out_dtype: float32\n", "---\nmodels: []\n", "no single YAML document"),
    ],
)
def test_errors_name_the_key_and_the_line(tmp_path, old, new, message):
    assert old in TIES
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, TIES.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_slerp_needs_two_models_and_t(tmp_path):
    text = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    with pytest.raises(UserError, match="slerp needs the parameter 't'"):
        load(tmp_path, text)
    got = load(tmp_path, text + "parameters: {t: 0.25}\n")
    assert (got.base, got.experts, got.template) == (None, ("a", "b"), "a")
    with pytest.raises(UserError, match="exactly one other model"):
        load(tmp_path, text.replace("{model: b}", "{model: b}, {model: c}"))


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yml")
    for text in ("", "- a\n", "just text"):
        with pytest.raises(UserError, match="must be a mapping"):
            load(tmp_path, text)
