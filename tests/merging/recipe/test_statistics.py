"""Recipes and algorithms on disk whose methods need statistics of the experts on data."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import SHAPES, read, write

import sdjax
from sdjax.core.errors import UserError
from sdjax.io.statistics_folder import StatisticsFolder
from sdjax.io.weights_digest import weights_digest
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.recipe.expert_statistics import ExpertStatistics
from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
from sdjax.merging.recipe.model_card import Provenance
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.models.tensor_names import parse_name

RECIPE = """\
merge_method: {method}
models:
  - {{model: math, parameters: {{weight: 0.4}}{stats}}}
  - {{model: code, parameters: {{weight: 0.8}}}}
dtype: float32
"""


def make_stats(seed, kinds=("fisher", "gram")):
    rng, stats = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        path = parse_name(name).path
        if "fisher" in kinds:
            stats[f"fisher/{path}"] = rng.random(shape).astype(np.float32)
        if "gram" in kinds and path.endswith("_proj"):
            x = rng.standard_normal((9, shape[1]))
            path = path.replace("up_proj", "gate_proj")
            stats[f"gram/{path}"] = (x.T @ x / 9).astype(np.float32)
    return stats


def store(folder, stats):
    folder.mkdir()
    save_file(stats, folder / "model.safetensors")
    model = folder.with_suffix("")
    manifest = {"model": model.name, "weights": weights_digest(model)}
    manifest |= {"examples": 9, "data": "a.jsonl"}
    (folder / "statistics.json").write_text(json.dumps(manifest))


@pytest.fixture
def with_stats(tmp_path, models):
    found = {name: make_stats(seed) for seed, name in enumerate(("math", "code"))}
    for name, stats in found.items():
        store(tmp_path / f"{name}.stats", stats)
    return SimpleNamespace(models=models, stats=found)


def in_memory(tensors, stats, method, **options):
    trees = [{k: jnp.asarray(v, jnp.float32) for k, v in x.items()} for x in tensors]
    merged = sdjax.merge(trees[0], trees[1:], method, stats=stats, **options)
    return {name: np.asarray(x) for name, x in merged.params.items()}


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_recipes_find_statistics_next_to_the_models(tmp_path, with_stats, method):
    recipe = write(tmp_path, RECIPE.format(method=method, stats=""))
    result = merge_recipe(recipe, tmp_path / "out")
    experts = [with_stats.models[name] for name in ("math", "code")]
    zero = {name: np.zeros_like(x) for name, x in experts[0].items()}
    stats = [with_stats.stats[name] for name in ("math", "code")]
    want = in_memory([zero, *experts], stats, method, weight=[0.4, 0.8])
    got = read(tmp_path / "out")
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, rtol=1e-5, atol=1e-6)
    assert any("math.stats (9 examples of a.jsonl)" in note for note in result.notes)
    assert "math.stats (9 examples" in (tmp_path / "out" / "README.md").read_text()


def test_named_statistics_and_a_merge_of_one_slot(tmp_path, with_stats):
    named = tmp_path / "elsewhere"
    (tmp_path / "math.stats").rename(named)
    recipe = write(tmp_path, RECIPE.format(method="fisher", stats=", stats: elsewhere"))
    merge_recipe(recipe, tmp_path / "out")
    models = open_models(
        str(tmp_path / "base"),
        {name: str(tmp_path / name) for name in ("math", "code")},
        tmp_path,
    )
    merge_algorithm(
        algorithm("fisher", weight=(0.4, 0.8)),
        models,
        "all",
        tmp_path / "relative",
        provenance=Provenance(method="fisher", file="program.py", text="", seed=0),
        key=jax.random.key(0),
        stats={"math": str(named)},
    )
    first, second = (read(tmp_path / name) for name in ("out", "relative"))
    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="--stats art: no expert of this name"):
        merge_algorithm(
            algorithm("fisher"),
            models,
            "all",
            tmp_path / "third",
            provenance=Provenance(method="fisher", file="program.py", text="", seed=0),
            key=jax.random.key(0),
            stats={"art": str(named)},
        )


def test_statistics_of_other_weights_are_refused(tmp_path, with_stats):
    recipe = write(tmp_path, RECIPE.format(method="fisher", stats=", stats: code.stats"))
    message = "line 3: fisher: .*code.stats: statistics of code, not of math; name those of math"
    with pytest.raises(UserError, match=message):
        merge_recipe(recipe, tmp_path / "out")
    weights = tmp_path / "code" / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    save_file({**tensors, name: tensors[name] + 1}, weights, {"format": "pt"})
    recipe = write(tmp_path, RECIPE.format(method="fisher", stats=""))
    message = "line 4: fisher: .*code.stats: statistics of earlier weights of code; .* again with"
    with pytest.raises(UserError, match=message):
        merge_recipe(recipe, tmp_path / "out")
    save_file(tensors, weights)  # at another time, the same weights
    merge_recipe(recipe, tmp_path / "out")


def test_changed_statistics_are_not_resumed_and_others_are_refused(tmp_path, with_stats):
    recipe = write(tmp_path, RECIPE.format(method="regmean", stats=""))
    fisher = {k: v for k, v in with_stats.stats["code"].items() if k.startswith("fisher")}
    (tmp_path / "code.stats" / "model.safetensors").unlink()
    save_file(fisher, tmp_path / "code.stats" / "model.safetensors")
    with pytest.raises(UserError, match="regmean: the statistics of code have no gram; compute"):
        merge_recipe(recipe, tmp_path / "out")
    damaged = {**with_stats.stats["code"], "gram/layers/0/mlp/gate_proj": np.eye(3)}
    save_file(
        {k: v.astype(np.float32) for k, v in damaged.items()},
        tmp_path / "code.stats" / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"has shape \[3, 3\], not \[4, 4\]; they belong to"):
        merge_recipe(recipe, tmp_path / "out")


def test_missing_and_needless_statistics(tmp_path, models):
    recipe = write(tmp_path, RECIPE.format(method="fisher", stats=""))
    message = r"recipe.yml, line 3: fisher: no statistics of math; compute them .* by `stats:` in a"
    with pytest.raises(UserError, match=message):
        merge_recipe(recipe, tmp_path / "out")
    recipe = write(tmp_path, RECIPE.format(method="linear", stats=", stats: math.stats"))
    notes = merge_recipe(recipe, tmp_path / "out").notes
    assert any("line 3: stats has no meaning for linear; ignored" in note for note in notes)


def test_statistics_of_other_vocabularies_are_refused(tmp_path, with_stats):

    folders = [StatisticsFolder(tmp_path / f"{name}.stats") for name in ("math", "code")]
    statistics = ExpertStatistics(algorithm("fisher"), folders, ["math", "code"])
    with pytest.raises(UserError, match="embed: the vocabularies differ"):
        statistics.of_tensor({0: "embed", 1: "embed"}, (11, 4), realigned=True)
