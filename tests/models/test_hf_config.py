"""Reading and writing config.json: agreement with transformers, and every kind of error."""

import dataclasses
import json
import math

import pytest
import transformers

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.hf_config import from_hf, to_hf

CONFIG_CLASSES = {
    name: getattr(transformers, f"{prefix}Config")
    for name, prefix in {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma2": "Gemma2",
        "gemma3_text": "Gemma3Text",
        "phi3": "Phi3",
    }.items()
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
LONG = {"short_factor": [1.0] * 6, "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}
CHANGES = {
    "llama": [{}, {"head_dim": 10, "rope_theta": 5e5, "eos_token_id": [1, 2]}],
    "mistral": [{}, {"sliding_window": None, "num_key_value_heads": 2}],
    "qwen2": [{}, {"use_sliding_window": True, "max_window_layers": 3}],
    "qwen3": [
        {},
        {
            "rope_theta": 1e6,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ],
    "gemma2": [{}, {"query_pre_attn_scalar": 144, "final_logit_softcapping": None}],
    "gemma3_text": [
        {},
        {
            "sliding_window_pattern": 3,
            "rope_theta": 2e6,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ],
    "phi3": [
        {},
        {
            "original_max_position_embeddings": 1024,
            "rope_scaling": {"type": "longrope", **LONG},
        },
        {"partial_rotary_factor": 0.5, "sliding_window": 512},
    ],
}
CASES = [(name, changes) for name, variants in CHANGES.items() for changes in variants]


def transformers_fields(name: str, fields: dict) -> dict:
    """Return the fields as transformers writes them, with its defaults filled in."""
    config_class = CONFIG_CLASSES[name]
    return json.loads(json.dumps(config_class.from_dict(json.loads(json.dumps(fields))).to_dict()))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_omitted_fields_get_transformers_defaults(name, changes):
    fields = {**SIZES, "model_type": name, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields.update(changes)
    if name in ("qwen2", "qwen3"):  # their default fits one model size only
        fields["num_key_value_heads"] = 4
    if name == "mistral":
        fields.setdefault("num_key_value_heads", 4)
    config = from_hf(fields, "config.json")
    assert config == from_hf(transformers_fields(name, fields), "config.json")


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_config_survives_round_trip_here_and_through_transformers(name, changes):
    config = from_hf(
        {**SIZES, "model_type": name, "num_key_value_heads": 2, **changes}, "config.json"
    )
    fields = to_hf(config, dtype="bfloat16")
    assert from_hf(json.loads(json.dumps(fields)), "config.json") == config
    assert from_hf(transformers_fields(name, fields), "config.json") == config


def test_windows_and_ropes_of_each_layer():
    gemma = from_hf({**SIZES, "model_type": "gemma3_text", "sliding_window": 7}, "config.json")
    assert gemma.windows == (7, 7, 7, 7, 7, None, 7, 7)
    assert [rope.theta for rope in gemma.ropes] == [1e4] * 5 + [1e6] + [1e4] * 2
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 6}
    qwen = from_hf({**SIZES, "model_type": "qwen2", **windows}, "config.json")
    assert qwen.windows == (None,) * 6 + (7, 7)
    llama = from_hf({**SIZES, "model_type": "llama", "sliding_window": 7}, "config.json")
    assert set(llama.windows) == {None}
    assert len({qwen, gemma, llama}) == 3  # hashable, as static arguments of jit must be


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {}, "model_type 'gpt2' is not supported; use one of llama, mistral, qwen2"),
        ("gemma3", {}, "model_type 'gemma3' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported; only False is"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        ("gemma2", {"hidden_activation": "gelu"}, "only 'gelu_pytorch_tanh' is"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"vocab_size": None}, "the required field 'vocab_size' is missing"),
        ("llama", {"vocab_size": "many"}, "vocab_size must be an integer, not 'many'"),
        ("llama", {"hidden_size": 0}, "hidden_size must be at least 1, not 0"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads are not divisible by 3"),
        (
            "gemma2",
            {"layer_types": ["full_attention"]},
            "layer_types must list sliding_attention",
        ),
        (
            "gemma2",
            {"layer_types": ["linear_attention"] * 8},
            "layer_types must list sliding_attention",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; use one of default, linear, llama3, yarn",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "of type 'linear' need the field 'factor'"),
        (
            "gemma2",
            {"query_pre_attn_scalar": -4},
            "query_pre_attn_scalar must be at least 1, not -4",
        ),
        ("gemma2", {"sliding_window": 0}, "sliding_window must be at least 1, not 0"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcap must be above 0, not 0.0"),
        ("llama", {"rms_norm_eps": -1}, "norm_eps must be 0 or more, not -1.0"),
        ("llama", {"eos_token_id": 2**31}, "eos_token_id must be a token id or a list"),
        ("llama", {"eos_token_id": [2] * 5_000}, "eos_token_id must be a token id or a list"),
        ("llama", {"eos_token_id": True}, "eos_token_id must be a token id or a list"),
        ("llama", {"rope_theta": "far"}, "the rope parameter rope_theta must be a number"),
        ("llama", {"rope_theta": -5.0}, "rope_theta must be above 0, not -5.0"),
        ("llama", {"rope_theta": 0}, "rope_theta must be above 0, not 0.0"),
        ("llama", {"rope_scaling": "foo"}, "rope_scaling is 'foo'; it must be a JSON object"),
        ("llama", {"num_attention_heads": 0}, "num_heads must be at least 1, not 0"),
        ("llama", {"hidden_size": 1e400}, "hidden_size must be an integer, not inf"),
        (
            "llama",
            {"eos_token_id": [1, None]},
            "eos_token_id must be a token id or a list",
        ),
        ("gemma2", {"layer_types": 5}, "layers with a sliding window are unknown"),
        (
            "gemma3_text",
            {"sliding_window_pattern": 0},
            "layers with a sliding window are unknown",
        ),
        ("llama", {"num_hidden_layers": "12"}, "num_hidden_layers must be an integer, not '12'"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000, not"),
        ("gemma2", {"num_hidden_layers": 1e300}, "num_hidden_layers must be at most 10,000, not"),
        ("llama", {"num_hidden_layers": -1}, "num_layers must be at least 1, not -1"),
        ("llama", {"num_hidden_layers": math.nan}, "num_hidden_layers must be an integer, not nan"),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer, not 2.5"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be an integer, not True"),
        ("llama", {"num_hidden_layers": {}}, "num_hidden_layers must be an integer, not {}"),
        ("llama", {"hidden_size": 10**400}, "hidden_size must be at most 2,147,483,647, not 1000"),
        ("llama", {"hidden_size": 2**31 - 1, "head_dim": None}, "head_dim must be at most 65,536"),
        ("llama", {"vocab_size": ["x" * 9999]}, "vocab_size must be an integer, not ['xxx"),
        ("llama", {"rms_norm_eps": 1e308}, "rms_norm_eps must be a number, not 1e+308"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps must be a number, not inf"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ("llama", {"bos_token_id": "<s>"}, "bos_token_id must be an integer, not '<s>'"),
        ("llama", {"pad_token_id": [0]}, "pad_token_id must be an integer, not [0]"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        ("gemma2", {"sliding_window": "7"}, "sliding_window must be an integer, not '7'"),
        ("gemma2", {"sliding_window_pattern": 1e400}, "layers with a sliding window are unknown"),
        ("llama", {"rope_theta": 10**400}, "parameter rope_theta must be a number"),
        ("llama", {"rope_theta": math.nan}, "rope_theta must be a number, not nan"),
        ("llama", {"partial_rotary_factor": 1e300}, "must be a number, not 1e+300"),
        ("llama", {"partial_rotary_factor": math.nan}, "must be a number, not nan"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, "rope type ['yarn'] is not supported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "do not fit heads"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": math.inf}},
            "the rope parameter attention_factor must be a number, not inf",
        ),
        (
            "llama",
            {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}},
            "do not fit heads",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", **LONG, "long_factor": 5}},
            "the rope parameter long_factor must be a list of numbers, not 5",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": 5}},
            "rope_parameters.full_attention is 5; it must be a JSON object",
        ),
        (["llama"], {}, "model_type ['llama'] is not supported"),
        ("llama", {"partial_rotary_factor": 2.0}, "do not fit heads of 12 dimensions"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [1.0] * 5}},
            "do not fit heads of 12 dimensions",
        ),
    ],
)
def test_unsupported_config_raises_one_line_error(name, changes, message):
    with pytest.raises(UserError) as error_info:
        from_hf({**SIZES, "model_type": name, **changes}, "some/config.json")
    assert message in str(error_info.value)
    assert str(error_info.value).startswith("some/config.json: ")
    assert "\n" not in str(error_info.value)


def test_round_trip_preserves_every_field():
    """Check that no field is reset to its default because from_hf or to_hf omits it."""
    config = ModelConfig(
        family="gemma2",
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        max_seq_len=99,
        norm_eps=1e-3,
        tie_embeddings=False,
        sliding_window=9,
        layer_types=("full_attention", "sliding_attention"),
        query_pre_attn_scalar=5,
        attn_logit_softcap=6.0,
        final_logit_softcap=7.0,
        bos_token_id=3,
        pad_token_id=0,
        eos_token_ids=(4, 5),
    )
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    changed = {name for name, value in vars(config).items() if value != defaults[name]}
    assert changed >= {*defaults} - {"rope", "local_rope", "tie_embeddings"}
    assert from_hf(to_hf(config, dtype="float32"), "config.json") == config


VALUES = (True, "12", [], [1.5], {}, {"a": 1}, math.nan, math.inf, -1e308, 1e-320, 0, -1, 10**200)
SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"type": "yarn", "factor": 2.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    | {"beta_fast": 32, "beta_slow": 1, "truncate": True, "original_max_position_embeddings": 99},
    {"type": "longrope", **LONG, "factor": 2.0, "attention_factor": None},
]


def message_of(fields):
    """Return the error about a config; "" if it is valid and can be written."""
    try:
        config = from_hf(fields, "config.json")
    except UserError as error:
        return str(error)
    json.dumps(to_hf(config, dtype="float32"), allow_nan=False)
    return ""


def is_one_line(message):
    return message.startswith("config.json: ") and message.isprintable() and len(message) < 400


def test_any_value_of_any_field_is_refused_in_one_line_or_valid():
    fields = {**SIZES, "model_type": "gemma3_text"}
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "num_key_value_heads"]
    others = ["rms_norm_eps", "eos_token_id", "bos_token_id", "tie_word_embeddings", "layer_types"]
    windows = ["sliding_window", "sliding_window_pattern", "max_window_layers", "hidden_act"]
    scalars = ["query_pre_attn_scalar", "final_logit_softcapping", "partial_rotary_factor"]
    ropes = ["rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"]
    for key in (*sizes, *others, *windows, *scalars, *ropes):
        for value in VALUES:
            message = message_of({**fields, key: value})
            assert not message or is_one_line(message), (key, value)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_any_value_of_a_rope_scaling_is_refused_in_one_line_or_valid(scaling):
    fields = {**SIZES, "model_type": "llama"}
    assert message_of({**fields, "rope_scaling": scaling}) == ""
    for key in scaling:
        for value in VALUES:
            message = message_of({**fields, "rope_scaling": {**scaling, key: value}})
            assert not message or is_one_line(message), (key, value)
