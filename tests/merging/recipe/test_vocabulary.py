import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdjax.core.errors import UserError
from sdjax.io.buffer_pool import BufferPool
from sdjax.io.vocabulary import read_vocabulary
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.merging.recipe.tokenizer_plan import (
    RowAlignment,
    align_rows,
    is_identity,
    match_tokens,
)

MODELS = Path(__file__).parent / "mergekit" / "models"


def test_rows_are_matched_by_token():
    tokens = {"a": 0, "b": 1, "new": 2}
    models = {"one": ({"a": 0, "b": 1}, 2), "two": ({"b": 0, "new": 1, "unused": 2}, 2)}
    got = match_tokens(tokens, models, multiple=4)
    assert got.size == 4
    np.testing.assert_array_equal(got.rows["one"], [0, 1, -1])
    np.testing.assert_array_equal(got.rows["two"], [-1, 0, 1])
    assert not is_identity(got, {"one": 2, "two": 2})
    same = match_tokens({"a": 0, "b": 1}, {"one": models["one"]})
    assert is_identity(same, {"one": 2})


def test_missing_rows_come_from_other_models():
    one = np.array([[1.0, 1.0], [2.0, 2.0]], np.float32)
    two = np.array([[10.0, 10.0], [20.0, 20.0]], np.float32)
    three = np.array([[6.0, 8.0]], np.float32)
    # Tokens that all models have, only the first, the first and the second, none.
    rows = tuple(np.array(x, np.int32) for x in ([0, 1, 1, -1], [0, -1, 1, -1], [0, -1, -1, -1]))
    got = align_rows([one, two, three], RowAlignment(rows=rows, size=5))
    np.testing.assert_array_equal(got[0][:4], [[1, 1], [2, 2], [2, 2], [0, 0]])
    np.testing.assert_array_equal(got[1][:4], [[10, 10], [2, 2], [20, 20], [0, 0]])
    np.testing.assert_array_equal(got[2][:4], [[6, 8], [2, 2], [11, 11], [0, 0]])
    np.testing.assert_allclose(got[1][4], [8, 8])  # padding: the mean row
    based = align_rows([one, two, three], RowAlignment(rows=rows, size=4, fallback=1))
    np.testing.assert_array_equal(based[2][2], [20, 20])


def test_aligned_rows_have_the_common_dtype():
    half = np.ones((2, 2), ml_dtypes.bfloat16)
    single = np.full((2, 2), 1 + 2**-20, np.float32)
    alignment = RowAlignment(rows=(np.array([0, 1], np.int32),) * 2, size=2)
    assert [x.dtype for x in align_rows([half, single], alignment)] == [np.float32] * 2
    assert align_rows([half, half], alignment)[0].dtype == ml_dtypes.bfloat16


def test_vocabularies_of_different_size_merge_by_token(tmp_path, monkeypatch):
    monkeypatch.chdir(MODELS)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n  - model: base\n    parameters: {weight: 1}\n"
        "  - model: wide\n    parameters: {weight: 3}\ndtype: float32\n"
    )
    written = merge_recipe(recipe, tmp_path / "out")
    first, second = written.notes
    assert first.startswith("the vocabulary sizes differ (base 11, wide 12): the result has")
    assert second == (
        "wide: 12 tokens, the result has 11; merged by token: 2 are dropped, 1 are filled in from "
        "the other models"
    )
    assert read_vocabulary(tmp_path / "out") == read_vocabulary(MODELS / "base")
    name = "model.embed_tokens.weight"
    tables = []
    for folder in (MODELS / "base", MODELS / "wide", tmp_path / "out"):
        with safe_open(folder / "model.safetensors", framework="numpy") as opened:
            tables.append(opened.get_tensor(name))
    base, wide, out = tables
    ids = read_vocabulary(MODELS / "wide")
    for token, row in read_vocabulary(MODELS / "base").items():
        other = wide[ids[token]] if token in ids else base[row]
        np.testing.assert_allclose(out[row], (base[row] + 3 * other) / 4, rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 11


def test_read_buffers_are_released(tmp_path, monkeypatch):
    """Check also tensors whose rows are aligned in new memory."""
    pools = []

    class Watched(BufferPool):
        def __init__(self):
            super().__init__()
            pools.append(self)

    monkeypatch.setattr("sdjax.merging.recipe.pipeline.BufferPool", Watched)
    monkeypatch.chdir(MODELS)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels: [{model: base}, {model: wide}]\nparameters: {weight: 1}\n"
        "tokenizer_source: union\nbase_model: base\n"
    )
    merge_recipe(recipe, tmp_path / "out")
    (pool,) = pools
    assert pool.num_acquired == 0


@pytest.mark.parametrize(("source", "size"), [("base", 11), ("union", 13), ("wide", 12)])
def test_transformers_reads_the_merged_tokenizer(tmp_path, monkeypatch, source, size):
    from transformers import AutoTokenizer

    monkeypatch.chdir(MODELS)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels: [{model: base}, {model: wide}]\nparameters: {weight: 1}\n"
        f"tokenizer_source: {source}\nbase_model: base\n"
    )
    merge_recipe(recipe, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer.get_vocab()) == size
    ids = tokenizer("a b <im> x", add_special_tokens=False)["input_ids"]
    vocabulary = read_vocabulary(tmp_path / "out")
    assert ids == [
        vocabulary.get(token, vocabulary["<unk>"]) for token in ("a", "b", "<im>", "x")
    ] or (source == "base")


def test_tensors_over_the_vocabulary_are_aligned_in_any_family(tmp_path):
    """Check a renamed embedding, a renamed output matrix, and a bias with an element per token."""
    for name in ("base", "wide"):
        shutil.copytree(MODELS / name, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = {
            key.replace("model.embed_tokens", "embed_in").replace("lm_head", "embed_out"): tensor
            for key, tensor in load_file(file).items()
        }
        tensors["lm_head.bias"] = tensors["embed_in.weight"][:, 0].copy()
        tensors.setdefault("embed_out.weight", tensors["embed_in.weight"] + 1)
        save_file(tensors, file)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"architectures": ["Other"], "model_type": "other", "tie_word_embeddings": False}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels: [{model: base}, {model: wide}]\nparameters: {weight: 1}\n"
        "tokenizer_source: union\nbase_model: base\n"
    )
    merge_recipe(recipe, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert len(got["embed_in.weight"]) == len(got["embed_out.weight"]) == 13
    np.testing.assert_array_equal(got["lm_head.bias"], got["embed_in.weight"][:, 0])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 13


def test_embedding_of_unknown_name_cannot_be_aligned(tmp_path):
    for name in ("base", "wide", "math"):
        shutil.copytree(MODELS / name, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        named = {
            key.replace("model.embed_tokens", "vectors").replace("lm_head", "vectors_out"): tensor
            for key, tensor in load_file(file).items()
        }
        cut = {key: x[:11] if key.startswith("vectors") else x for key, x in named.items()}
        save_file(cut, file)
        config = tmp_path / name / "config.json"
        config.write_text(config.read_text().replace("LlamaForCausalLM", "OtherForCausalLM"))
    recipe = tmp_path / "r.yaml"
    text = "merge_method: linear\nmodels: [{{model: base}}, {{model: {}}}]\n"
    text += "parameters: {{weight: 1}}\ntokenizer_source: {}\n"
    recipe.write_text(text.format("wide", "union"))
    with pytest.raises(UserError, match="line 4: the rows of base cannot be matched by token"):
        merge_recipe(recipe, tmp_path / "out")
    recipe.write_text(text.format("math", "base"))  # the same tokens
    assert merge_recipe(recipe, tmp_path / "out").notes == ()


def test_token_id_that_no_vocabulary_has_is_refused(tmp_path):
    fields = json.loads((MODELS / "base" / "tokenizer.json").read_text())
    token = next(iter(fields["model"]["vocab"]))
    fields["model"]["vocab"][token] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"the id 2,147,483,648; ids may be at most"):
        read_vocabulary(tmp_path)
