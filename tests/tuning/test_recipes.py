import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from sdjax.core.errors import UserError
from sdjax.merging.engine import Merger
from sdjax.merging.recipe.from_algorithm import open_models
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.merging.recipe.recipe_reader import parse_recipe
from sdjax.models.tensor_names import parse_name
from sdjax.tuning.open_tunable import open_tunable, read_named_merge
from sdjax.tuning.setup import merged_dtypes

RECIPE = """\
# Tuned by hand.
merge_method: ties
base_model: base
models:
  - model: base
  - model: math
    parameters:
      weight: [0.5, 1.0]  # along the layers
      density:
        - {filter: self_attn, value: 0.7}
        - value: &shared 0.4
  - model: code
    parameters:
      weight: [{value: 0, filter: norm}, {value: 0.25}]
      density: *shared
parameters:
  lambda: 0.9
  normalize: false
"""
NAMES = [
    *("weight[math, 1 of 2]", "weight[math, 2 of 2]", "weight[code]"),
    *("density[math, self_attn]", "density[math]", "lambda"),
]
EVOLVE = """\
genome:
  models: [math, code]
  merge_method: ties
  base_model: base
  layer_granularity: 1
  filters: [mlp]
tasks:
  - {name: gsm8k_train, weight: 1.0}
"""


def open_recipe(folder, text, model_set):
    path = folder / "recipe.yaml"
    path.write_text(text)
    named = read_named_merge(str(path))
    return named, open_tunable(str(path), model_set(base=named.base, experts=named.experts))


def away_from_start(tunable):
    return tunable.start + np.linspace(0.01, 0.1, len(tunable.parameters))


def check_merge(folder, tensors, named, tunable, values):
    """Check that the written recipe merges as in memory; return the result."""
    (folder / "tuned.yaml").write_text(tunable.write(values))
    merge_recipe(folder / "tuned.yaml", folder / "merged")
    on_disk = tensors(folder / "merged")
    base = None if named.base is None else tensors(folder / named.base)
    experts = [tensors(folder / model) for model in named.experts.values()]
    merged = Merger(base, experts)(tunable.bind(values)).params
    assert on_disk.keys() == merged.keys()
    for name, tensor in merged.items():
        if on_disk[name].dtype == jnp.bfloat16:
            np.testing.assert_array_equal(on_disk[name], np.asarray(tensor), err_msg=name)
        else:  # merges from disk are compiled with other options
            np.testing.assert_allclose(on_disk[name], np.asarray(tensor), rtol=0, atol=1e-6)
    return on_disk


def test_numbers_of_a_recipe_are_parameters(tmp_path, model_set):
    named, tunable = open_recipe(tmp_path, RECIPE, model_set)
    assert (named.base, dict(named.experts)) == ("base", {"expert_1": "math", "expert_2": "code"})
    assert sorted(p.name for p in tunable.parameters) == sorted(NAMES)
    assert tunable.write(tunable.start) == RECIPE
    text = tunable.write(away_from_start(tunable))
    pairs = zip(RECIPE.split("\n"), text.split("\n"), strict=True)
    assert sum(old != new for old, new in pairs) == 5
    assert "# along the layers" in text
    assert "&shared" in text


@pytest.mark.parametrize(
    "method", ["task_arithmetic", pytest.param("ties", marks=pytest.mark.slow)]
)
def test_a_tuned_recipe_merges_as_in_memory(folders, tensors, model_set, method):
    named, tunable = open_recipe(folders, RECIPE.replace("ties", method), model_set)
    check_merge(folders, tensors, named, tunable, away_from_start(tunable))


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"ties": "task_arithmetic"}, (3, 12)),  # groups, and numbers: 2 models x 2 sets for each
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ({}, (3, 24)),
                ({"layer_granularity: 1": "layer_granularity: 3"}, (1, 8)),
                ({"layer_granularity: 1": "layer_granularity: 1\n  smooth: true"}, (3, 24)),
                ({"ties": "linear", "base_model: base": "allow_negative_weights: true"}, (3, 12)),
                ({"ties": "task_arithmetic", "  filters: [mlp]\n": ""}, (3, 6)),
            ]
        ),
    ],
)
def test_a_genome_has_the_numbers_of_mergekit_evolve(folders, tensors, model_set, changes, sizes):
    text = EVOLVE
    for old, new in changes.items():
        text = text.replace(old, new)
    named, tunable = open_recipe(folders, text, model_set)
    groups, count = sizes
    assert len(tunable.parameters) == count
    starts = {p.name.partition("[")[0]: p.start for p in tunable.parameters}
    assert starts == {"weight": 0.5} | ({"density": 1.0} if "ties" in text else {})
    share = np.linspace(0.1, 0.4, count)
    values = tunable.bounds[:, 0] + share * np.ptp(tunable.bounds, axis=1)
    merged = check_merge(folders, tensors, named, tunable, values)
    assert ("slices" in tunable.write(values)) == (groups > 1 and "smooth" not in text)
    assert merged["lm_head.weight"].any()


@pytest.mark.parametrize("folders", ["float32"], indirect=True)
@pytest.mark.parametrize("groups", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_genome_over_slerp_chooses_two_models(folders, tensors, model_set, groups):
    text = f"""\
genome:
  models: [math, base, code]
  merge_method: slerp
  base_model: base
  layer_granularity: {3 // groups}
"""
    named, tunable = open_recipe(folders, text, model_set)
    assert (named.base, list(named.experts.values())) == (None, ["math", "base", "code"])
    assert [p.start for p in tunable.parameters] == [1 / 3] * 3 * groups
    numbers = [0.1, 0.7, 0.3, 0.2, 0.2, -0.5, 1.0, 0.0, 1.5]
    check_merge(folders, tensors, named, tunable, np.array(numbers[: 3 * groups]))
    written = yaml.safe_load(tunable.write(np.array(numbers[: 3 * groups])))
    slices = written["slices"] if groups > 1 else [written]
    # t = softmax of the two largest numbers; of equal ones, the first is the base.
    expected = [("base", 0.401312), ("math", 0.5), ("code", 0.377541)]
    found = [(part["base_model"], part["parameters"]["t"]) for part in slices]
    assert found == expected[:groups]

    def position(values):
        return tunable.bind(values).at("x", 0.0).hyperparameters["t"]

    gradient = jax.grad(position)(jnp.array(numbers[: 3 * groups]))
    np.testing.assert_allclose(gradient[:3], [0.0, -0.24026, 0.24026], atol=1e-5)
    assert not gradient[3:].any()


def test_options_of_mergekit_evolve_are_reported(tmp_path, model_set):
    named, _ = open_recipe(tmp_path, EVOLVE + "limit: 100\n", model_set)
    (note,) = named.notes
    assert note.endswith("recipe.yaml: limit: ignored; use the command's options")


def test_groups_of_layers_switch_at_their_ends(folders, model_set):
    _, tunable = open_recipe(folders, EVOLVE.replace("  filters: [mlp]\n", ""), model_set)
    values = np.zeros(len(tunable.parameters))
    for i, parameter in enumerate(tunable.parameters):
        if parameter.name.startswith("weight[math, group"):
            values[i] = 1 + int(parameter.name[-2])
    algorithm = tunable.bind(values)

    def weight(name, depth):
        return algorithm.at(name, depth).hyperparameters["weight"][0]

    assert [weight("x", depth) for depth in (0, 0.5, 1)] == [1, 2, 3]
    assert weight("model.embed_tokens.weight", -1.0) == 1
    assert weight("lm_head.weight", -1.0) == weight("model.norm.weight", -1.0) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[gsm8k_train]", ("gsm8k",)),
        ("[{name: hendrycks_math_algebra}, minerva_math]", ("math",)),
        ("[arithmetic, mmlu]", ("arithmetic", "mmlu")),  # mmlu has no counterpart
    ],
)
def test_tasks_of_the_harness_are_translated(tmp_path, model_set, names, expected):
    start = EVOLVE.partition("tasks:")[0]
    named, _ = open_recipe(tmp_path, f"{start}tasks: {names}\n", model_set)
    assert named.tasks == expected


SLICES = "slices: [{sources: [{model: math, layer_range: [0, 1]}]}]\nmerge_method: passthrough\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SLICES, "line 1: tuning takes whole models; write models instead of slices"),
        (RECIPE + "tokenizer_source: union\n", "tuning keeps the base's tokenizer"),
        (RECIPE.replace("ties", "./mine.py"), "tune ./mine.py itself"),
        (RECIPE.replace("0.7", "1.7"), "density[math, self_attn]: the bounds [0, 1] exclude"),
        (RECIPE.replace("0.7", "big"), "expected a number, found 'big'"),
        (RECIPE.replace("normalize: false", "normalize: [true, false]"), "write a single value"),
        (RECIPE.replace("weight: [0.5, 1.0]", "wieght: 1"), "did you mean weight?"),
        ("experts: []\ngate_mode: hidden\n", "unknown key 'gate_mode'"),
        ("merge_method: karcher\nmodels: [{model: a}, {model: b}]\n", "no number to tune"),
        (
            "merge_method: linear\nmodels: [{model: a}]\n",
            "linear needs the parameter 'weight'",
        ),
        (EVOLVE.replace("ties", "slerp"), "slerp gives every model a weight; add base to models"),
        (
            EVOLVE.replace("ties", "slerp").replace("base_model: base", "normalize: true"),
            "line 6: filters: a genome over slerp has none",
        ),
        (EVOLVE.replace("ties", "tise"), "merge_method 'tise': did you mean ties?"),
        (EVOLVE.replace("filters", "filter"), "did you mean filters?"),
        (EVOLVE.replace("layer_granularity: 1", "layer_granularity: 2"), "3 layers, which is not"),
        (
            EVOLVE.replace("[mlp]", str(["mlp"] * 2_000)),
            "24,012 numbers; at most 20,000 can be tuned",
        ),
        (EVOLVE.replace("  base_model: base\n", ""), "ties needs base_model"),
        (EVOLVE.replace("ties", "linear"), "linear gives every model a weight; add base to models"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, model_set, text, message):
    with pytest.raises(UserError) as raised:
        open_recipe(tmp_path, text, model_set)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lists_need_layers(tmp_path, model_set):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="lists of numbers run along the layers, but"):
        open_tunable(str(tmp_path / "recipe.yaml"), model_set(paths=("layers/0/mlp/up_proj",)))


@pytest.mark.parametrize("folders", ["bfloat16"], indirect=True)
@pytest.mark.slow
def test_a_recipe_with_a_dtype_is_searched_in_it(folders, tensors, model_set):
    text = """\
merge_method: task_arithmetic
base_model: base
models: [{model: math, parameters: {weight: 0.3}}]
dtype: float32
"""
    named, tunable = open_recipe(folders, text, model_set)
    sources = open_models(named.base, named.experts, folders)
    recipe = parse_recipe(tunable.write(tunable.start), folders / "recipe.yaml")
    dtypes = merged_dtypes(recipe, sources)
    merge_recipe(recipe, folders / "merged")
    base = tensors(folders / "base")
    cast = {
        parse_name(name).path: x.astype(dtypes[parse_name(name).path]) for name, x in base.items()
    }
    experts = [
        {parse_name(name).path: x for name, x in tensors(folders / model).items()}
        for model in named.experts.values()
    ]
    in_memory = Merger(cast, experts)(tunable.bind(tunable.start)).params
    for name, tensor in tensors(folders / "merged").items():
        found = np.asarray(in_memory[parse_name(name).path])
        assert found.dtype == tensor.dtype == np.float32
        np.testing.assert_allclose(found, tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folders", ["bfloat16"], indirect=True)
def test_a_dtype_that_rounds_the_merge_is_refused(folders, model_set):
    named, tunable = open_recipe(folders, RECIPE + "dtype: float16\n", model_set)
    sources = open_models(named.base, named.experts, folders)
    recipe = parse_recipe(tunable.write(tunable.start), folders / "recipe.yaml")
    with pytest.raises(UserError, match=r"recipe.yaml, line 19: the base is stored in bfloat16,"):
        merged_dtypes(recipe, sources)
    unset = parse_recipe(RECIPE, folders / "recipe.yaml")
    stored = {info.dtype for info in sources.base.info.values()}
    assert set(merged_dtypes(unset, sources).values()) == stored


def test_a_genome_names_its_models(folders, model_set):
    text = EVOLVE.replace("  layer_granularity: 1\n  filters: [mlp]\n", "")
    _, tunable = open_recipe(folders, text, model_set)
    names = [parameter.name for parameter in tunable.parameters]
    assert names == ["weight[math]", "density[math]", "weight[code]", "density[code]"]
