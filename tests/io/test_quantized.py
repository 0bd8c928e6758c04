"""Weights in 8-bit floats, and quantized weights that are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.io.safetensors_writer import write_safetensors
from sdjax.io.weights import open_model_weights
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.testing import tiny_model

RNG = np.random.default_rng(0)
E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16


def folder(tmp_path, tensors, **config):
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return open_model_weights(tmp_path)


def by_block(weights, scales, block):
    """Multiply each element by the scale of its block, one at a time, in float32."""
    result = np.zeros(weights.shape, np.float32)
    for row, column in np.ndindex(weights.shape):
        scale = np.float32(scales[row // block[0], column // block[1]])
        result[row, column] = np.float32(weights[row, column]) * scale
    return result.astype(BF16)


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
TENSORS = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("ending", "scale_shape", "block", "config"),
    [
        ("_scale_inv", (2, 3), (4, 4), FP8),  # the last blocks are cut off: 7 x 10
        ("_scale_inv", (1, 1), (128, 128), {}),
        ("_scale", (7, 1), (1, 10), {"quantization_config": TENSORS}),
        ("_scale", (7,), (1, 10), {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
        ("_scale", (7, 2), (1, 5), {"quantization_config": TENSORS}),
        ("_scale", (1,), (7, 10), {"quantization_config": {"quant_method": "fp8"}}),
        ("_scale", (), (7, 10), {"dtype": "bfloat16"}),
        (
            "_scale",
            (3, 5),
            (3, 2),
            {
                "quantization_config": {
                    **TENSORS,
                    "config_groups": {"group_0": {"weights": {"block_structure": [3, 2]}}},
                }
            },
        ),
    ],
)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_8_bit_floats_are_multiplied_by_their_scales(
    tmp_path, monkeypatch, ending, scale_shape, block, config, dtype
):
    narrow = RNG.standard_normal((7, 10)).astype(dtype)
    scales = np.asarray(RNG.uniform(0.5, 2, scale_shape), np.float32)
    tensors = {
        "x.weight": narrow,
        f"x.weight{ending}": scales,
        "x.input_scale": np.float32(1),
        "attn.k_scale": np.float32(1),
        "norm.weight": np.ones(3, BF16),
        "ids": np.arange(3),
    }
    reader = folder(tmp_path, tensors, **config)
    assert reader.names == ("ids", "norm.weight", "x.weight")
    assert reader.notes == ("1 tensor stored as 8-bit floats: dequantized to bfloat16",)
    per_block = scales.reshape(-(-7 // block[0]), -(-10 // block[1]))
    expected = by_block(narrow, per_block, block)
    for limit in (2**24, 50):
        monkeypatch.setattr("sdjax.io.float8_reader.MAX_BLOCK_BYTES", limit)
        assert reader.dtype("x.weight") == BF16
        np.testing.assert_array_equal(reader.read("x.weight"), expected)
        box = (slice(3, 7), slice(2, 9))
        np.testing.assert_array_equal(reader.read_box("x.weight", box), expected[box])
    np.testing.assert_array_equal(reader.read("ids"), np.arange(3))


def test_experts_and_tensors_without_scales(tmp_path):
    experts = RNG.standard_normal((2, 8, 4)).astype(E4M3)
    scales = RNG.uniform(0.5, 2, (2, 2, 1)).astype(np.float32)
    tensors = {"up": experts, "up_scale_inv": scales, "norm": np.ones(3, E4M3)}
    reader = folder(tmp_path, tensors, torch_dtype="float32", **FP8)
    expected = experts.astype(np.float32) * scales.repeat(4, axis=1)
    np.testing.assert_array_equal(reader.read("up"), expected)
    box = (slice(1, 2), slice(3, 6), slice(1, 3))
    np.testing.assert_array_equal(reader.read_box("up", box), expected[box])
    np.testing.assert_array_equal(reader.read("norm"), np.ones(3, np.float32))


@pytest.mark.parametrize(
    "scales", [np.ones((3, 3), np.float32), np.ones(4, np.int32), np.ones((1, 7, 1), np.float32)]
)
def test_scales_that_do_not_fit_are_refused(tmp_path, scales):
    tensors = {"x.weight": np.ones((7, 10), E4M3), "x.weight_scale": scales}
    with pytest.raises(UserError, match=r"does not fit the 8-bit floats x\.weight") as error:
        folder(tmp_path, tensors, **FP8)
    assert "\n" not in str(error.value)


def in_8_bits(model):
    """Store the projections of a model in 8 bits, with scales of blocks of 4 x 4."""
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weights = tensors[name].astype(np.float32)
        scales = RNG.uniform(0.5, 2, [-(-size // 4) for size in weights.shape])
        tensors[f"{name}_scale_inv"] = scales.astype(np.float32)
        tensors[name] = weights.astype(E4M3)
    write_safetensors(model / "model.safetensors", tensors)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **FP8}))
    return tensors


def test_a_model_in_8_bits_is_loaded_and_merged(tmp_path):
    write_model(tmp_path / "model", *tiny_model())
    tensors = in_8_bits(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = by_block(tensors[name], tensors[f"{name}_scale_inv"], (4, 4))
    _, params = load_model(tmp_path / "model")
    loaded = np.asarray(params["layers"]["0"]["mlp"]["up_proj"]).astype(np.float32)
    expected_dtype = json.loads((tmp_path / "model" / "config.json").read_text())["dtype"]
    np.testing.assert_allclose(loaded, expected.astype(np.float32), rtol=2**-8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: model}]\n")
    result = merge_recipe(recipe, tmp_path / "out")
    assert result.notes == (
        f"model: 14 tensors stored as 8-bit floats: dequantized to {expected_dtype}",
    )
    assert result.notes[0] in (tmp_path / "out" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    np.testing.assert_array_equal(
        np.asarray(load_model(tmp_path / "out")[1]["layers"]["0"]["mlp"]["up_proj"]), loaded
    )


PACKED = np.ones((2, 2), np.int32)


@pytest.mark.parametrize(
    ("tensors", "method", "message"),
    [
        ({"x.qweight": PACKED, "x.qzeros": PACKED, "x.g_idx": PACKED}, "gptq", "by GPTQ"),
        ({"x.qweight": PACKED, "x.qzeros": PACKED, "x.g_idx": PACKED}, None, "by GPTQ"),
        ({"x.qweight": PACKED, "x.qzeros": PACKED}, "awq", "by AWQ"),
        ({"x.qweight": PACKED, "x.qzeros": PACKED}, None, "by GPTQ or AWQ"),
        ({"x.weight": PACKED, "x.weight.absmax": PACKED}, "bitsandbytes", r"model\.dequantize"),
        ({"x.weight": PACKED, "x.weight.quant_state.bitsandbytes__nf4": PACKED}, None, "bitsandb"),
        ({"x.weight": PACKED, "x.SCB": PACKED}, None, "by bitsandbytes"),
        ({"x.weight_packed": PACKED}, "compressed-tensors", "by compressed-tensors"),
        ({"x.weight": PACKED.astype(np.int8)}, "compressed-tensors", "by compressed-tensors"),
        ({"x.gate_up_proj_blocks": PACKED.astype(np.uint8)}, "mxfp4", "by MXFP4"),
        ({"x.weight": PACKED}, "new\nmethod", "by an unknown method"),
    ],
)
def test_packed_weights_are_refused_by_name(tmp_path, tensors, method, message):
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    with pytest.raises(UserError, match=f"the weights are quantized {message}|{message}") as error:
        folder(tmp_path, tensors, **config)
    assert "use the model that was quantized" in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_float64_in_and_out(tmp_path, method):
    wide = {}
    for name in ("a", "b"):
        write_model(tmp_path / name, *tiny_model())
        path = tmp_path / name / "model.safetensors"
        wide[name] = {
            n: t.astype(np.float64) * RNG.uniform(1, 2, t.shape) for n, t in load_file(path).items()
        }
        write_safetensors(path, wide[name])
    models = "[{model: a}, {model: b}]" if method == "linear" else "[{model: a}]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: {method}\nmodels: {models}\nparameters: {{weight: 1}}\n")
    result = merge_recipe(recipe, tmp_path / "out")
    assert "a: has float64 tensors, which are merged in float32 like all others" in result.notes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float64"
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = wide["a"][name]
        expected = (expected + wide["b"][name]) / 2 if method == "linear" else expected
        assert tensor.dtype == np.float64
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-7)
    params = load_model(tmp_path / "out")[1]
    assert params["embed"].dtype == np.float32


def test_dequantized_models_are_reported_once(tmp_path, caplog):
    write_model(tmp_path / "model", *tiny_model())
    in_8_bits(tmp_path / "model")
    with caplog.at_level("INFO", logger="sdjax"):
        load_model(tmp_path / "model")
        load_model(tmp_path / "model")
    assert caplog.messages == [
        f"{tmp_path / 'model'}: 14 tensors stored as 8-bit floats: dequantized to float32"
    ]
