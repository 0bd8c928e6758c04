"""Families that name their tensors differently, or count their layers elsewhere."""

import json

import numpy as np
import pytest
from small_models import SHAPES, TASK_ARITHMETIC, read, rewrite, wide, write

from sdjax.core.errors import UserError
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


def test_tied_models_stay_tied(tmp_path, models):
    for name in models:
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
    merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
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
