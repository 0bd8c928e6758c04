"""Models that fit together by their shapes, but not by their configs."""

import json

import numpy as np
import pytest
from small_models import TASK_ARITHMETIC, read, rewrite, write

from sdjax.core.errors import UserError
from sdjax.merging.recipe.pipeline import merge_recipe

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
MAMBA = {"model_type": "mamba", "hidden_act": "silu", "num_attention_heads": 2, "rope_theta": 1e4}


def notes(tmp_path, config, **changes):
    """Merge a base with an expert whose config differs; return the notes."""
    config = {key: value for key, value in config.items() if key != "architectures"}
    for model in ("base", "math", "code"):
        own = {**config, **changes} if model == "math" else config
        (tmp_path / model / "config.json").write_text(json.dumps(own))
    recipe = write(tmp_path, TASK_ARITHMETIC)
    return merge_recipe(recipe, tmp_path / "out", allow_crimes=False).notes


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"model_type": "mistral"}, "model_type mistral instead of llama"),
        (LLAMA, {"num_attention_heads": 2}, "num_heads 2 instead of 4"),
        (LLAMA, {"num_key_value_heads": 1}, "num_kv_heads 1 instead of 2"),
        (MAMBA, {"hidden_act": "gelu"}, "hidden_act gelu instead of silu"),
        (
            {**MAMBA, "text_config": {"num_attention_heads": 2}},
            {"text_config": {"num_attention_heads": 1}},
            "text_config.num_attention_heads 1 instead of 2",
        ),
    ],
)
def test_another_architecture_raises_user_error(tmp_path, models, config, changes, message):
    with pytest.raises(UserError) as caught:
        notes(tmp_path, config, **changes)
    line = 5  # of the expert in the recipe
    assert (
        f"recipe.yml, line {line}: math has a different architecture from base: {message}; "
        in str(caught.value)
    )
    assert str(caught.value).endswith("--allow-crimes")
    assert not (tmp_path / "out").exists()


def test_another_architecture_merges_with_allow_crimes(tmp_path, models):
    config = {"architectures": ["MistralForCausalLM"]}
    (tmp_path / "math" / "config.json").write_text(json.dumps(config))
    base = {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    result = merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out", allow_crimes=True)
    note = "architecture MistralForCausalLM instead of LlamaForCausalLM"
    assert any(note in n for n in result.notes)
    assert note in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"rope_theta": 1e6}, "rope_theta 1e+06 instead of 10000"),
        (LLAMA, {"rms_norm_eps": 1e-5}, "norm_eps 1e-05 instead of 1e-06"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling linear instead of none",
        ),
        (MAMBA, {"rope_theta": 1e6}, "rope_theta 1e+06 instead of 10000"),
    ],
)
def test_settings_that_change_the_function_give_a_note(tmp_path, models, config, changes, message):
    (note,) = notes(tmp_path, config, **changes)
    assert note.startswith("math: its config changes what its weights compute")
    assert message in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "math: its config has no model_type, "),
        ({"architectures": ["MambaForCausalLM"]}, "base: its config has no architectures, "),
    ],
)
def test_missing_architecture_gives_a_note(tmp_path, models, changes, message):
    note = notes(tmp_path, MAMBA, **changes)[0]
    assert note.startswith(message)
    assert "was not fully compared with that of" in note


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        # transformers 5 writes the same rotary base elsewhere, and defaults may be omitted.
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        (LLAMA, {"rope_scaling": None, "rms_norm_eps": 1e-6}),
        (LLAMA, {"torch_dtype": "float32", "use_cache": False, "_name_or_path": "x"}),
        (MAMBA, {"transformers_version": "5.0", "head_dim": 4}),
    ],
)
def test_configs_of_the_same_function_give_no_note(tmp_path, models, config, changes):
    assert notes(tmp_path, config, **changes) == ()


IDS, MASK = "model.position_ids", "model.layers.0.self_attn.bias"


def test_integer_and_boolean_tensors_are_copied(tmp_path, models):
    buffers = {IDS: np.arange(5)[None], MASK: np.tril(np.ones((2, 2), bool))}
    for model in ("base", "math", "code"):
        rewrite(tmp_path / model, models[model], **buffers)
    rewrite(tmp_path / "code", models["code"], **{**buffers, IDS: np.arange(6)[None]})
    result = merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
    got = read(tmp_path / "out")
    for name, value in buffers.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value)
    assert result.coverage == "merged 5 of 7 tensors; 2 copied from base"
    assert result.notes == (
        f"code: the integer or boolean tensor {IDS} differs from base's, which the result has",
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_quantized_weights_raise_user_error(tmp_path, models):
    packed = {"model.layers.0.mlp.qweight": np.zeros((2, 2), np.int32)}
    rewrite(tmp_path / "math", models["math"], **packed)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "math" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"math: the weights are quantized by GPTQ \(.*qweight\)"):
        merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out")
