"""Merges of named parts, of models with different tensors, and of experts as one tensor."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import read, rewrite, wide, write

from sdjax.core.errors import UserError
from sdjax.io.vocabulary import read_vocabulary
from sdjax.merging.recipe.documents import recipe_targets
from sdjax.merging.recipe.model_parts import part_of
from sdjax.merging.recipe.pipeline import merge_recipe

MODELS = Path(__file__).parent / "mergekit" / "models"
UP = "model.layers.0.mlp.up_proj.weight"
HALF = """\
merge_method: task_arithmetic
base_model: base
models: [{model: math, parameters: {weight: 0.5}}]
dtype: float32
"""


def draw(tmp_path, models, names, **config):
    """Rewrite the models with random tensors of these names; return them by model."""
    rng = np.random.default_rng(1)
    for model in models:
        models[model] = {n: rng.standard_normal((2, 3)).astype(np.float32) for n in names}
        rewrite(tmp_path / model, models[model])
        (tmp_path / model / "config.json").write_text(json.dumps({"model_type": "x", **config}))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "text_decoder"),
        ("lm_head.weight", "text_decoder"),
        ("visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("visual.blocks.0.attn.proj.weight", "vision_tower"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "multi_modal_projector"),
        ("vision_tower.encoder.layers.0.fc.weight", "vision_tower"),
    ],
)
def test_parts_have_the_names_of_tensors_or_those_of_mergekit(name, part):
    assert part_of(name, ["text_decoder", "multi_modal_projector", "vision_tower"]) == part
    assert part_of("model.visual.x.weight", ["model.visual", "default"]) == "model.visual"
    assert part_of("model.visual.merger.x.weight", ["model.visual"]) == "model.visual"
    assert part_of("model.visual.x.weight", ["visual"]) == "visual"
    assert part_of("model.norm.weight", ["visual"]) is None


def test_the_documented_recipe_of_parts(tmp_path, models):
    page = (Path(__file__).parents[3] / "docs" / "merging.md").read_text()
    (text,) = re.findall(r"\n\n((?:    [^\n]*\n)*    modules:\n(?:    [^\n]*\n)*)", page)
    for name in ("BASE", "MATH", "CODE"):
        text = text.replace(f"OWNER/{name}", name.lower())
    text_name, merger, block = names = [
        "model.language_model.norm.weight",
        "model.visual.merger.norm.weight",
        "model.visual.blocks.0.norm1.weight",
    ]
    draw(tmp_path, models, names)
    result = merge_recipe(write(tmp_path, textwrap.dedent(text)), tmp_path / "out")
    assert any(f"the tensor {merger} of parts" in note for note in result.notes), result.notes
    base, math, code = (models[model] for model in ("base", "math", "code"))
    expected = {
        text_name: 0.6 * math[text_name] + 0.4 * code[text_name],
        merger: base[merger],
        block: 0.5 * (base[block] + math[block]),
    }
    for name, tensor in read(tmp_path / "out").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_stack_of_one_part_and_copy_of_the_others(tmp_path, models):
    names = [f"{stack}.block.{i}.w" for stack in ("encoder", "decoder") for i in range(3)]
    counts = {"is_encoder_decoder": True, "num_layers": 3, "num_decoder_layers": 3}
    draw(tmp_path, models, [*names, "shared.weight"], **counts)
    text = (
        "merge_method: passthrough\nmodules:\n  decoder:\n    slices:\n"
        "      - sources: [{model: math, layer_range: [0, 2]}]\n"
        "      - sources: [{model: code, layer_range: [1, 3]}]\n"
    )
    result = merge_recipe(write(tmp_path, text), tmp_path / "out")
    assert any("4 tensors (such as encoder.block.0.w) of parts that" in n for n in result.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 4)
    got = read(tmp_path / "out")
    sources = [("math", 0), ("math", 1), ("code", 1), ("code", 2)]
    for number, (model, layer) in enumerate(sources):
        expected = models[model][f"decoder.block.{layer}.w"]
        np.testing.assert_array_equal(got[f"decoder.block.{number}.w"], expected)
    for name in (*names[:3], "shared.weight"):
        np.testing.assert_array_equal(got[name], models["math"][name])
    text = text.replace("decoder:", "encoder:")
    del counts["num_decoder_layers"]  # then `num_layers` counts both
    draw(tmp_path, models, [*names, "shared.weight"], **counts)
    with pytest.raises(UserError, match="does not say how many layers the model has"):
        merge_recipe(write(tmp_path, text), tmp_path / "other")


def test_names_that_versions_of_transformers_move(tmp_path, models):
    old = ["language_model.model.norm.weight", "language_model.model.layers.0.up.weight"]
    draw(tmp_path, models, old)
    moved = {n.replace("language_model.model", "model.language_model"): n for n in old}
    rewrite_names = {new: models["math"][name] for new, name in moved.items()}
    save_file(rewrite_names, tmp_path / "math" / "model.safetensors")
    merge_recipe(write(tmp_path, HALF), tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        expected = (models["base"][name] + models["math"][name]) / 2
        np.testing.assert_allclose(tensor, expected, rtol=1e-6)


def test_tensors_that_one_expert_lacks_are_merged_from_the_others(tmp_path, models):
    text = HALF.replace("}}]", "}}, {model: code, parameters: {weight: 0.25}}]")
    names = ["model.norm.weight", "score.weight", "model.layers.0.up.weight"]
    draw(tmp_path, models, names)
    fewer = {name: tensor for name, tensor in models["math"].items() if name != "score.weight"}
    save_file(fewer, tmp_path / "math" / "model.safetensors")
    result = merge_recipe(write(tmp_path, text), tmp_path / "out")
    assert result.notes == ("math: lacks the tensor score.weight that base has: merged without it",)
    base, math, code = (models[model] for model in ("base", "math", "code"))
    for name, tensor in read(tmp_path / "out").items():
        expected = base[name] + 0.25 * (code[name] - base[name])
        if name != "score.weight":
            expected = expected + 0.5 * (math[name] - base[name])
        np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-6)
    slerp = "merge_method: slerp\nbase_model: base\nmodels: [{model: math}]\nparameters: {t: 0.5}\n"
    merge_recipe(write(tmp_path, slerp), tmp_path / "other")
    np.testing.assert_array_equal(read(tmp_path / "other")["score.weight"], base["score.weight"])


@pytest.mark.parametrize("fuse", [True, False])
def test_experts_are_merged_as_one_tensor_on_request(tmp_path, models, fuse):
    """Compare with the angle between all experts of a layer, or that of each expert."""
    experts = [
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"
        for e in range(2)
        for part in ("gate", "up")
    ]
    draw(tmp_path, models, [*experts, "model.norm.weight"])
    text = (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: math}]\n"
        f"parameters: {{t: 0.5, fuse_experts: {str(fuse).lower()}}}\n"
    )
    result = merge_recipe(write(tmp_path, text), tmp_path / "out")
    assert result.tensors == 5
    got = read(tmp_path / "out")
    for group in [experts] if fuse else [[name] for name in experts]:
        a, b, out = (
            np.concatenate([wide(model[name]) for name in group])
            for model in (models["base"], models["math"], got)
        )
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        expected = np.sin(angle / 2) / np.sin(angle) * (a + b)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_a_recipe_chooses_for_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(MODELS)
    wide_ids, base_ids = read_vocabulary(MODELS / "wide"), read_vocabulary(MODELS / "base")
    only = min(wide_ids.keys() - base_ids.keys())
    shared = min(wide_ids.keys() & base_ids.keys())
    tokens = {
        only: {"source": {"kind": "zero"}},
        shared: {"source": "wide", "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "wide", "token": only}},
        "<id>": {"source": {"kind": "model_token", "model": "wide", "token_id": 3}},
    }
    text = (
        "merge_method: linear\nbase_model: base\nmodels: [{model: base}, {model: wide}]\n"
        "parameters: {weight: 1}\ndtype: float32\ntokenizer: "
    )
    choice = {"source": "union", "tokens": tokens}
    merge_recipe(write(tmp_path, text + json.dumps(choice)), tmp_path / "out")
    name = "model.embed_tokens.weight"
    got, own = (
        load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "out", Path("wide"))
    )
    ids = read_vocabulary(tmp_path / "out")
    np.testing.assert_allclose(got[ids[shared]], own[wide_ids[shared]], rtol=1e-6)
    np.testing.assert_allclose(got[ids[only]], own[wide_ids[only]] / 2, rtol=1e-6)
    np.testing.assert_allclose(got[ids["<new>"]], own[wide_ids[only]], rtol=1e-6)
    np.testing.assert_allclose(got[ids["<id>"]], own[3], rtol=1e-6)
    for source, message in (("math", "is not one of the merged models"), ("base", "has no row")):
        choice["tokens"] = {only: {"source": source}}
        with pytest.raises(UserError, match=f"line 6: .*{message}"):
            merge_recipe(write(tmp_path, text + json.dumps(choice)), tmp_path / "other")


def test_rule_that_gives_layers_a_kind_by_number(tmp_path, models):
    names = [f"model.layers.{i}.w" for i in range(4)]
    draw(tmp_path, models, names, num_hidden_layers=4, first_k_dense_replace=1, mlp_only_layers=[3])
    text = (
        "merge_method: passthrough\nslices:\n  - sources: [{model: math, layer_range: [%d, 2]}]\n"
        "  - sources: [{model: code, layer_range: [1, 4]}]\n"
    )
    merge_recipe(write(tmp_path, text % 0), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["mlp_only_layers"]) == (5, [4])
    with pytest.raises(UserError, match="first_k_dense_replace=1 gives layers a kind by number"):
        merge_recipe(write(tmp_path, text % 1), tmp_path / "other")


def test_overridden_architecture_is_that_of_the_result(tmp_path, models):
    text = HALF.replace("base_model: base", "base_model: {model: base, override_architecture: Y}")
    draw(tmp_path, models, [UP], architectures=["X"])
    with pytest.raises(UserError, match="math has a different architecture"):
        merge_recipe(write(tmp_path, text), tmp_path / "out")
    merge_recipe(write(tmp_path, text), tmp_path / "out", allow_crimes=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Y"]


def test_only_models_are_overwritten(tmp_path, models):
    recipe, out = write(tmp_path, HALF), tmp_path / "out"
    merge_recipe(recipe, out)
    first = read(out)
    with pytest.raises(UserError, match="exists and is not empty"):
        merge_recipe(recipe, out)
    merge_recipe(write(tmp_path, HALF.replace("0.5", "0.25")), out, overwrite=True)
    assert not np.array_equal(read(out)[UP], first[UP])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(UserError, match="is one of the merged models"):
        merge_recipe(recipe, tmp_path / "math", overwrite=True)
    (out / "config.json").unlink()
    with pytest.raises(UserError, match="is not a model to overwrite"):
        merge_recipe(recipe, out, overwrite=True)


def test_recipes_of_one_file_use_one_anothers_results(tmp_path, models):
    first = "name: mean\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [math, code]\n"
    first = first.replace("[math, code]", "[{model: math}, {model: code}]")
    last = HALF.replace("model: math", "model: mean")
    path = write(tmp_path, f"# two recipes\n---\n{last}---\n{first}")
    targets = [(recipe.name, folder) for recipe, folder in recipe_targets(path, tmp_path / "out")]
    assert targets == [("mean", tmp_path / "out.parts" / "mean"), (None, tmp_path / "out")]
    for recipe, folder in recipe_targets(path, tmp_path / "out"):
        merge_recipe(recipe, folder)
    base, math, code = (wide(models[model][UP]) for model in ("base", "math", "code"))
    expected = base + 0.5 * ((math + code) / 2 - base)
    np.testing.assert_allclose(read(tmp_path / "out")[UP], expected, rtol=1e-2)
    shutil.rmtree(tmp_path / "out")  # the named result is used as it is
    assert [r.name for r, _ in recipe_targets(path, tmp_path / "out")] == [None]
    path = write(tmp_path, f"{last}---\n{first.replace('1}', '2}')}")
    with pytest.raises(UserError, match="was not merged by this recipe 'mean'"):
        list(recipe_targets(path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: math", "model: mean", "line 1: 'mean' needs its own result"),
        ("name: mean", "name: ../x", "line 1: name must be that of a folder"),
        ("name: mean\n", "", "line 5: another recipe has no name"),
    ],
)
def test_recipes_of_one_file_must_be_in_an_order(tmp_path, models, old, new, message):
    first = "name: mean\nmerge_method: karcher\nmodels: [{model: math}, {model: code}]\n\n"
    path = write(tmp_path, f"{first.replace(old, new)}---\n{HALF}")
    with pytest.raises(UserError, match=message):
        list(recipe_targets(path, tmp_path / "out"))
