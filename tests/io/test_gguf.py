"""GGUF files: element types against llama.cpp's own package, names, changes and damaged files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdjax.core.errors import UserError
from sdjax.io import gguf_file as gguf_file_module
from sdjax.io.gguf_blocks import ELEMENT_TYPES
from sdjax.io.gguf_reader import GgufReader
from sdjax.io.hf_checkpoint import load_config, load_model, write_model
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.models.families import FAMILIES
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.testing import tiny_model
from tests.fuzzing.gguf_files import F16, F32, Q8_0, gguf_file, in_gguf

REFERENCES = json.loads((Path(__file__).parent / "gguf_references/references.json").read_text())
SIZES = {"hidden_size": 32, "intermediate_size": 64}
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", REFERENCES)
def test_quantized_types_equal_those_of_llama_cpp(tmp_path, monkeypatch, name):
    """The references come from the gguf package (`gguf_references/make_references.py`)."""
    reference = REFERENCES[name]
    blocks = bytes.fromhex(reference["blocks"])
    kind, elements = reference["type"], reference["elements"]
    assert ELEMENT_TYPES[kind].name == name
    numbers = np.frombuffer(bytes.fromhex(reference["numbers"]), np.float32)
    # Three rows of two blocks, the second of them in another order.
    half = len(blocks) // 2
    content = blocks + blocks[half:] + blocks[:half] + blocks
    first, second = numbers.reshape(2, elements)
    expected = np.stack([numbers, np.concatenate([second, first]), numbers])
    tensors = {"blk.0.ffn_down.weight": (kind, (3, 2 * elements), content)}
    settings = {"general.architecture": "qwen2"}
    (tmp_path / "m.gguf").write_bytes(gguf_file(settings, tensors))
    reader = GgufReader(tmp_path)
    (tensor,) = reader.names
    assert tensor == "model.layers.0.mlp.down_proj.weight"
    assert reader.notes == (f"1 tensor of m.gguf in {name}: dequantized to float32",)
    for limit in (2**24, 8 * elements):  # all at once, and row by row
        monkeypatch.setattr("sdjax.io.gguf_reader.MAX_BLOCK_BYTES", limit)
        np.testing.assert_array_equal(reader.read(tensor), expected)
        box = (slice(1, 3), slice(5, elements + 3))
        np.testing.assert_array_equal(reader.read_box(tensor, box), expected[box])


def model(tmp_path, family="llama", kind=F32, *, keep_config=True, **changes):
    """Write a tiny model as safetensors and as GGUF in a folder of its own."""
    config, params = tiny_model(family, **SIZES, **changes)
    write_model(tmp_path / "hf", config, params)
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(in_gguf(fields, tensors, kind))
    if keep_config:
        (folder / "config.json").write_text(json.dumps(fields))
    return config, tensors, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_from_gguf(tmp_path, family):
    scalar = {"query_pre_attn_scalar": 8} if family.startswith("gemma") else {}
    config, tensors, folder = model(tmp_path, family, **scalar)
    loaded, params = load_model(folder)
    assert loaded == load_config(tmp_path / "hf")
    atol = 2**-22 if family.startswith("gemma") else 0  # 1 was added to norms in float32
    for path, leaf in flatten(params).items():
        expected = tensors[param_specs(config)[path].hf_name]
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_config_json_is_not_needed_for_plain_families(tmp_path, family):
    config, _, folder = model(tmp_path, family, keep_config=False)
    loaded = load_config(folder)
    assert param_specs(loaded) == param_specs(config)
    for field in ("num_heads", "num_kv_heads", "head_dim", "rope", "max_seq_len", "eos_token_ids"):
        assert getattr(loaded, field) == getattr(config, field)
    assert loaded.norm_eps == pytest.approx(config.norm_eps)


def test_other_families_need_config_json(tmp_path):
    _, _, folder = model(tmp_path, "gemma2", keep_config=False, query_pre_attn_scalar=8)
    with pytest.raises(UserError, match=r"model\.gguf: its settings cannot replace config\.json"):
        load_config(folder)


@pytest.mark.parametrize(("kind", "rtol"), [(F16, 2**-11), (Q8_0, None)])
def test_gguf_models_are_merged_and_said_in_the_card(tmp_path, kind, rtol):
    _, tensors, _ = model(tmp_path, kind=kind)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels: [{model: hf}, {model: gguf}]\nparameters: {weight: 1}\n"
    )
    result = merge_recipe(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        if rtol is not None:
            np.testing.assert_allclose(merged[name], tensor, rtol=rtol, atol=1e-7)
        else:  # half a step of the block with the largest element
            np.testing.assert_allclose(merged[name], tensor, atol=np.abs(tensor).max() / 127)
    note = "gguf: 16 tensors of model.gguf in Q8_0: dequantized to float32"
    assert (note in result.notes) == (kind == Q8_0)
    assert (note in (tmp_path / "out" / "README.md").read_text()) == (kind == Q8_0)


def test_a_gguf_model_is_a_base_without_config_json(tmp_path):
    config, tensors, _ = model(tmp_path, keep_config=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: gguf}]\n")
    merge_recipe(recipe, tmp_path / "out")
    assert load_model(tmp_path / "out")[0].family == config.family
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(merged[name], tensor)


def test_split_files_are_read_as_one(tmp_path):
    settings = {"general.architecture": "qwen2"}
    parts = [
        {"token_embd.weight": (F32, (2, 3), np.arange(6, dtype=np.float32).tobytes())},
        {"output_norm.weight": (F32, (3,), np.ones(3, np.float32).tobytes())},
    ]
    for i, part in enumerate(parts):
        content = gguf_file(settings if i == 0 else {"split.no": i}, part)
        (tmp_path / f"m-{i + 1:05}-of-00002.gguf").write_bytes(content)
    reader = GgufReader(tmp_path)
    assert reader.names == ("model.embed_tokens.weight", "model.norm.weight")
    np.testing.assert_array_equal(reader.read("model.norm.weight"), np.ones(3))
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(UserError, match="has 1 of 2 parts of a GGUF file"):
        GgufReader(tmp_path)


def test_several_models_in_a_folder_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(gguf_file({}, {}))
    with pytest.raises(UserError, match=r"several GGUF models \(a\.gguf, b\.gguf\)"):
        GgufReader(tmp_path)


ONE = {"output_norm.weight": (F32, (3,), bytes(12))}
QWEN = {"general.architecture": "qwen2"}
VALID = gguf_file(QWEN, ONE)
FILES = {
    "empty": (b"", "does not begin with GGUF"),
    "another format": (b"ggml" + VALID[4:], "does not begin with GGUF"),
    "version 1": (gguf_file(QWEN, ONE, version=1), "version 1, or big-endian"),
    "big-endian": (VALID[:4] + VALID[4:8][::-1] + VALID[8:], "or big-endian"),
    "no header": (VALID[:20], "ends too early"),
    "truncated header": (VALID[:60], "ends too early|a text of"),
    "truncated data": (VALID[:-32], "'output_norm.weight' is not within the file"),
    "many tensors": (VALID[:8] + struct.pack("<Q", 10**9) + VALID[16:], "1,000,000,000 tensors"),
    "a huge text": (VALID[:24] + struct.pack("<Q", 2**62) + VALID[32:], "a text of"),
    "IQ2_XXS": (gguf_file(QWEN, {"output.weight": (16, (256,), bytes(66))}), "is IQ2_XXS, which"),
    "an unknown type": (gguf_file(QWEN, {"output.weight": (99, (4,), bytes(99))}), "is type 99"),
    "half a block": (gguf_file(QWEN, {"output.weight": (Q8_0, (2, 48), bytes(102))}), "broken blo"),
    "no elements": (gguf_file(QWEN, {"output.weight": (F32, (0, 2**60), b"")}), "of no or of"),
    "5 axes": (gguf_file(QWEN, {"output.weight": (F32, (1,) * 5, bytes(4))}), "has 5 axes"),
    "an unknown tensor": (gguf_file(QWEN, {"x.weight": (F32, (1,), bytes(4))}), "is not known in"),
    "experts": (
        gguf_file(QWEN, {"blk.0.ffn_up_exps.weight": (F32, (1,), bytes(4))}),
        "'blk.0.ffn_up_exps.weight' is not known in a model of qwen2; use the original model",
    ),
    "an architecture": (gguf_file({"general.architecture": "bert"}, ONE), "of 'bert' are not supp"),
    "no architecture": (gguf_file({}, ONE), "of None are not supported"),
    "an alignment": (gguf_file({**QWEN, "general.alignment": 0}, ONE), "not a small integer"),
    "two settings": (
        VALID[:16] + struct.pack("<Q", 2) + 2 * VALID[24:69] + VALID[69:],
        "two settings|ends too early|a text of",
    ),
    "heads": (
        gguf_file(
            {"general.architecture": "llama", "llama.attention.head_count": 3},
            {"blk.0.attn_q.weight": (F32, (4, 2), bytes(32))},
        ),
        "has 4 rows for 3 heads",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_unsupported_files_are_refused_in_one_line(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        GgufReader(tmp_path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_arrays_are_bounded_and_long_ones_are_skipped(tmp_path, monkeypatch):
    lists = {"short": [1, 2], "long": [1] * 2_000, "texts": ["a", "bc"] * 1_000, "empty": "x"}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file({**QWEN, **lists}, ONE))
    settings, tensors = gguf_file_module.read_gguf_header(path)
    assert settings == {**QWEN, "short": [1, 2], "empty": "x"}
    assert list(tensors) == list(ONE)
    monkeypatch.setattr(gguf_file_module, "MAX_ITEMS", 3_000)
    with pytest.raises(UserError, match="an array of 2,000 items"):
        gguf_file_module.read_gguf_header(path)
