"""Families that name their tensors differently, or count their layers elsewhere."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import SHAPES, TASK_ARITHMETIC, read, rewrite, wide, write

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
from sdjax.merging.recipe.model_card import Provenance
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.merging.recipe.tensor_roles import is_output_matrix, precedes_layers

STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: math, layer_range: [0, 2]}]
  - sources: [{model: code, layer_range: [1, 2]}]
"""
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def set_config(tmp_path, name, **fields):
    (tmp_path / name / "config.json").write_text(json.dumps(fields))


def merged_config(tmp_path, text=TASK_ARITHMETIC):
    """Merge by a recipe; return the config and the notes."""
    result = merge_recipe(write(tmp_path, text), tmp_path / "out")
    return json.loads((tmp_path / "out" / "config.json").read_text()), result.notes


@pytest.mark.parametrize(
    ("name", "output", "before"),
    [
        ("lm_head.weight", True, False),
        ("lm_head.bias", True, False),
        ("embed_out.weight", True, False),
        ("output.weight", True, False),
        ("language_model.lm_head.weight", True, False),
        ("model.visual.merger.output.weight", False, True),
        ("model.embed_tokens.weight", False, True),
        ("gpt_neox.embed_in.weight", False, True),
        ("transformer.wpe.weight", False, True),
        ("transformer.word_embeddings_layernorm.weight", False, True),
        ("bert.embeddings.position_embeddings.weight", False, True),
        ("backbone.embeddings.weight", False, True),
        ("multi_modal_projector.linear_1.weight", False, True),
        ("vision_tower.patch_embedding.weight", False, True),
        ("model.norm.weight", False, False),
        ("transformer.ln_f.weight", False, False),
        ("score.weight", False, False),
    ],
)
def test_roles_of_tensors_outside_the_layers(name, output, before):
    assert (is_output_matrix(name), precedes_layers(name)) == (output, before)


@pytest.mark.parametrize("output", ["embed_out.weight", "lm_head.weight"])
def test_untied_output_matrix_of_any_name_is_declared(tmp_path, models, output):
    head = {output: np.ones((11, 4), np.float32)}
    for name in models:
        rewrite(tmp_path / name, models[name], **head)
        set_config(tmp_path, name, model_type="gpt_neox", tie_word_embeddings=False)
    config, _ = merged_config(tmp_path)
    assert config["tie_word_embeddings"] is False
    assert output in read(tmp_path / "out")


def test_output_matrix_of_one_model_unties_a_family_that_ties_by_default(tmp_path, models):
    head = np.full((11, 4), 2, np.float32)
    rewrite(tmp_path / "math", models["math"], **{"lm_head.weight": head})
    for name in models:
        set_config(tmp_path, name, model_type="gemma2")
    set_config(tmp_path, "math", model_type="gemma2", tie_word_embeddings=False)
    config, _ = merged_config(tmp_path)
    assert config["tie_word_embeddings"] is False
    base, code = (wide(models[name][EMBEDDING]) for name in ("base", "code"))
    expected = base + 2 * (0.5 * (head - base) - 0.25 * (code - base))
    np.testing.assert_allclose(read(tmp_path / "out")["lm_head.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("bias", ["lm_head.bias", "cls.predictions.bias"])
def test_tied_models_stay_tied(tmp_path, models, bias):
    for name in models:
        rewrite(tmp_path / name, models[name], **{bias: np.zeros(11, np.float32)})
        set_config(tmp_path, name, model_type="gemma2", tie_word_embeddings=True)
    assert merged_config(tmp_path)[0]["tie_word_embeddings"] is True


@pytest.mark.parametrize("same", [True, False])
def test_stored_output_matrix_of_a_tied_model(tmp_path, models, same):
    head = models["math"][EMBEDDING] if same else models["code"][EMBEDDING]
    rewrite(tmp_path / "math", models["math"], **{"lm_head.weight": head})
    for name in models:
        set_config(tmp_path, name, model_type="llama", tie_word_embeddings=True)
    config, notes = merged_config(tmp_path)
    assert config["tie_word_embeddings"] is True
    assert [n for n in notes if "lm_head.weight differs from the embedding" in n] == (
        [] if same else list(notes)
    )
    assert len(notes) == (not same)


def test_stack_takes_what_precedes_the_layers_from_the_first_slice(tmp_path, models):
    renamed = {EMBEDDING: "backbone.embeddings.weight", NORM: "backbone.norm_f.weight"}
    for name in models:
        tensors = {
            renamed.get(n, n.replace("model.", "backbone.")): x for n, x in models[name].items()
        }
        models[name] = tensors
        rewrite(tmp_path / name, tensors)
        set_config(tmp_path, name, model_type="mamba", num_hidden_layers=2)
    models["code"]["backbone.norm_f.weight"] *= 2
    rewrite(tmp_path / "code", models["code"])
    config, _ = merged_config(tmp_path, STACK)
    got = read(tmp_path / "out")
    for name, model in (("backbone.embeddings.weight", "math"), ("backbone.norm_f.weight", "code")):
        np.testing.assert_array_equal(got[name], models[model][name])
    assert config["num_hidden_layers"] == 3


def test_layers_are_counted_in_the_section_of_the_language_model(tmp_path, models):
    text = {"model_type": "x_text", "num_hidden_layers": 2}
    for name, kind in (("math", "full"), ("code", "local")):
        section = {**text, "layer_types": [kind] * 2}
        set_config(tmp_path, name, model_type="x", text_config=section, vision_config={"depth": 2})
    config, _ = merged_config(tmp_path, STACK)
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["text_config"]["layer_types"] == ["full", "full", "local"]
    assert config["vision_config"] == {"depth": 2}
    set_config(tmp_path, "math", model_type="x", text_config={**text, "num_hidden_layers": 4})
    with pytest.raises(UserError, match=r"has 2 layers, but num_hidden_layers in config.json is 4"):
        merge_recipe(write(tmp_path, STACK), tmp_path / "other")


def test_stack_without_a_count_of_layers_raises_user_error(tmp_path, models):
    with pytest.raises(UserError, match="does not say how many layers the model has"):
        merge_recipe(write(tmp_path, STACK), tmp_path / "out")


def test_tensors_that_only_another_model_has_are_left_out(tmp_path, models):
    head = {"v_head.summary.weight": np.ones((1, 4), np.float32)}
    rewrite(tmp_path / "math", models["math"], **head)
    _, notes = merged_config(tmp_path)
    assert notes == ("math: the tensor v_head.summary.weight that base lacks: left out",)
    assert read(tmp_path / "out").keys() == SHAPES.keys()


def test_files_of_processors_and_chat_templates_come_along(tmp_path, models):
    files = {
        "preprocessor_config.json": "{}",
        "chat_template.json": "{}",
        "modeling_x.py": "x = 1",
        "additional_chat_templates/rag.jinja": "{{ x }}",
    }
    for name, text in files.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(text)
    for model, name in (("base", "rag_index.json"), ("math", "video_preprocessor_config.json")):
        (tmp_path / model / name).write_text("{}")
    result = merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    assert result.notes == (
        "base: rag_index.json is not copied",
        "math: video_preprocessor_config.json is not copied",
    )
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    merge_recipe(write(tmp_path, TASK_ARITHMETIC + "chat_template: chatml\n"), tmp_path / "other")
    templates = sorted(path.name for path in (tmp_path / "other").glob("*chat_template*"))
    assert templates == ["chat_template.jinja"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "nuslerp"])
def test_base_alone_is_copied(tmp_path, models, method):
    text = (
        f"merge_method: {method}\nbase_model: base\nslices:\n"
        "  - sources: [{model: base, layer_range: [0, 2]}]\ndtype: float32\n"
    )
    result = merge_recipe(write(tmp_path, text), tmp_path / "out")
    assert result.coverage == "merged 0 of 5 tensors; 5 copied from base"
    for name, tensor in read(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, models["base"][name].astype(np.float32))


def test_slice_without_layers_gives_the_tensors_after_the_last_layer(tmp_path, models):
    text = (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n"
        "      - {model: math, layer_range: [0, 2]}\n      - {model: code, layer_range: [0, 2]}\n"
        "  - sources: [{model: code, layer_range: [2, 2]}]\ndtype: float32\n"
    )
    models["code"][NORM] = models["code"][NORM] + models["code"][NORM]
    rewrite(tmp_path / "code", models["code"])
    for name in models:
        set_config(tmp_path, name, model_type="llama", num_hidden_layers=2)
    merge_recipe(write(tmp_path, text), tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        math, code = (wide(models[model][name]) for model in ("math", "code"))
        expected = code if name == NORM else (math + code) / 2
        np.testing.assert_allclose(tensor, expected, rtol=1e-6)
    empty = text.replace("[0, 2]", "[1, 1]")
    with pytest.raises(UserError, match="line 4: the result would have no layers"):
        merge_recipe(write(tmp_path, empty), tmp_path / "other")


GRADIENT = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: math, parameters: {weight: [0, 1]}}
dtype: float32
"""
# Families with several stacks of layers, or with layers of other names.
STACKS = {
    "vision": ("vision_tower.encoder.layers.{}.fc.weight", "language_model.layers.{}.fc.weight"),
    "prediction": ("mtp.layers.{}.fc.weight", "model.layers.{}.fc.weight"),
    "encoder-decoder": ("encoder.block.{}.layer.0.q.weight", "decoder.block.{}.layer.0.q.weight"),
    "gpt2": ("transformer.h.{}.mlp.c_fc.weight",),
    "bert": ("bert.encoder.layer.{}.output.dense.weight",),
}


@pytest.mark.parametrize("family", STACKS)
def test_whole_models_with_any_stacks_of_layers(tmp_path, models, family):
    """Check that each stack has its own gradient, by a weight that rises from 0 to 1."""
    names = [name.format(layer) for name in STACKS[family] for layer in range(3)]
    rng = np.random.default_rng(0)
    for model in models:
        tensors = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in names}
        models[model] = {**tensors, "wte.weight": rng.standard_normal((4, 3)).astype(np.float32)}
        rewrite(tmp_path / model, models[model])
        set_config(tmp_path, model, model_type="x", num_hidden_layers=3)
    merge_recipe(write(tmp_path, GRADIENT), tmp_path / "out")
    got = read(tmp_path / "out")
    assert got.keys() == models["base"].keys()
    for position, name in [(i % 3 / 2, name) for i, name in enumerate(names)] + [(0, "wte.weight")]:
        base, math = models["base"][name], models["math"][name]
        np.testing.assert_allclose(got[name], base + position * (math - base), rtol=1e-5, atol=1e-6)
    if family == "encoder-decoder":
        with pytest.raises(UserError, match="line 3: math is not a single stack of layers"):
            merge_recipe(write(tmp_path, STACK), tmp_path / "stack")


def halves(task_vectors):
    return 0.5 * task_vectors["expert_1"]


def test_program_merges_a_tied_expert_into_an_untied_base(tmp_path, models):
    head = np.full((11, 4), 2, np.float32)
    rewrite(tmp_path / "base", models["base"], **{"lm_head.weight": head})
    set_config(tmp_path, "base", model_type="llama", tie_word_embeddings=False)
    set_config(tmp_path, "math", model_type="llama", tie_word_embeddings=True)
    opened = open_models("base", {"expert_1": "math"}, tmp_path)
    result = merge_algorithm(
        Algorithm.from_function(halves),
        opened,
        "all",
        tmp_path / "out",
        provenance=Provenance(method="halves", file="program.py", text=""),
        key=jax.random.key(0),
    )
    assert result.coverage == "merged all 6 tensors"
    embedding = wide(models["math"][EMBEDDING])
    np.testing.assert_allclose(
        wide(read(tmp_path / "out")["lm_head.weight"]), (head + embedding) / 2, rtol=1e-5
    )
    assert Path(result.folder, "program.py").exists()


def test_program_cannot_merge_vocabularies_of_different_sizes(tmp_path, models):
    wider = np.zeros((13, 4), np.float32)
    rewrite(tmp_path / "math", {**models["math"], EMBEDDING: wider})
    opened = open_models("base", {"expert_1": "math"}, tmp_path)
    options = {
        "provenance": Provenance(method="halves", file="program.py", text=""),
        "key": jax.random.key(0),
    }
    method = Algorithm.from_function(halves)
    with pytest.raises(UserError, match="the vocabularies differ; narrow --scope, such as to mlp"):
        merge_algorithm(method, opened, "all", tmp_path / "out", **options)
    result = merge_algorithm(method, opened, "mlp", tmp_path / "out", **options)
    assert result.coverage == "merged 2 of 5 tensors (scope mlp); 3 copied from the base"
