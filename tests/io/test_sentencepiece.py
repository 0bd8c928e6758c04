"""Tokenizers that a folder has as a SentencePiece model alone."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from sdjax.core.errors import UserError
from sdjax.io import sentencepiece_model
from sdjax.io.hf_checkpoint import write_model
from sdjax.io.sentencepiece_model import read_sentencepiece
from sdjax.io.sentencepiece_tokenizer import build_tokenizer, has_piece_ids
from sdjax.io.tokenizer import load_tokenizer
from sdjax.io.vocabulary import read_vocabulary
from sdjax.merging.recipe.pipeline import merge_recipe
from sdjax.testing import tiny_model

FOLDER = Path(__file__).parent / "sentencepiece_references"
REFERENCES = json.loads((FOLDER / "references.json").read_text())
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", REFERENCES)
def test_ids_equal_those_of_the_sentencepiece_library(name):
    """The references come from the library itself (`make_references.py`)."""
    tokenizer = build_tokenizer(FOLDER / f"{name}.model", {})
    for text, ids in REFERENCES[name].items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_settings_add_tokens_and_ends(tmp_path):
    path = FOLDER / "bpe.model"
    size = build_tokenizer(path, {}).get_vocab_size()
    added = {str(size): {"content": "<user>", "special": True}, "3": {"content": "<sep>"}}
    settings = {**SETTINGS, "added_tokens_decoder": added, "add_eos_token": True}
    tokenizer = build_tokenizer(path, settings)
    ids = tokenizer.encode("the<user>fox").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert size in ids
    assert tokenizer.encode("the", add_special_tokens=False).ids == ids[1 : ids.index(size)]
    legacy = build_tokenizer(path, {**settings, "legacy": True}).encode("a<user>fox").tokens
    assert legacy[legacy.index("<user>") + 1] == "▁"
    with pytest.raises(UserError, match="gives '<user>' the id '9', but it is"):
        build_tokenizer(path, {"added_tokens_decoder": {"9": {"content": "<user>"}}})


@pytest.mark.parametrize(
    ("settings", "model_type", "expected"),
    [
        (SETTINGS, "llama", True),
        ({"tokenizer_class": "GemmaTokenizerFast"}, None, True),
        ({}, "mistral", True),
        ({}, "xlm-roberta", False),  # its ids are those of the pieces plus one
        ({"tokenizer_class": "T5Tokenizer"}, "llama", False),
    ],
)
def test_classes_whose_ids_are_those_of_the_pieces(settings, model_type, expected):
    assert has_piece_ids(settings, {"model_type": model_type}) == expected


def model(folder, name, *, vocab_size=320):
    write_model(folder, *tiny_model(vocab_size=vocab_size))
    shutil.copy(FOLDER / f"{name}.model", folder / "tokenizer.model")
    template = "{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}"
    settings = {**SETTINGS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path):
    model(tmp_path / "model", "bpe")
    tokenizer = load_tokenizer(tmp_path / "model")
    text = "the quick fox 12 café zzz"
    assert tokenizer.encode(text, add_special=False) == REFERENCES["bpe"][text]
    assert tokenizer.encode(text, add_special=True) == [1, *REFERENCES["bpe"][text]]
    assert tokenizer.decode([1, *REFERENCES["bpe"][text]]) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (1,))


@pytest.mark.slow  # imports transformers, and starts a process
def test_chat_templates_and_united_tokenizers_in_transformers(tmp_path):
    for name in ("bpe", "unigram"):
        model(tmp_path / name, name)
    assert load_tokenizer(tmp_path / "bpe").as_prompt("a b") == "<s>a b"
    merge(tmp_path, "union")
    text = "the quick fox 12 café zzz"
    tokenizer = load_tokenizer(tmp_path / "out")  # LlamaTokenizer of transformers
    assert tokenizer.encode(text, add_special=False) == REFERENCES["bpe"][text]
    assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


def merge(folder, source):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "merge_method: linear\nbase_model: bpe\nmodels: [{model: bpe, parameters: {weight: 1}}, "
        f"{{model: unigram, parameters: {{weight: 1}}}}]\ntokenizer_source: {source}\n"
    )
    merge_recipe(recipe, folder / "out")


@pytest.mark.parametrize("source", ["base", "union"])
def test_vocabularies_are_matched_and_united(tmp_path, source):
    for name in ("bpe", "unigram"):
        model(tmp_path / name, name)
    merge(tmp_path, source)
    first, second, merged = (read_vocabulary(tmp_path / n) for n in ("bpe", "unigram", "out"))
    assert set(merged) == (set(first) if source == "base" else set(first) | set(second))
    assert first.items() <= merged.items()
    assert (tmp_path / "out" / "tokenizer.json").exists() == (source == "union")
    assert (tmp_path / "out" / "tokenizer.model").exists() == (source == "base")


def message(*fields):
    """Return a protocol buffer of (number, value)."""
    content = b""
    for number, value in fields:
        match value:
            case bytes():
                content += bytes([number << 3 | 2]) + varint(len(value)) + value
            case float():
                content += bytes([number << 3 | 5]) + struct.pack("<f", value)
            case int():
                content += bytes([number << 3]) + varint(value)
    return content


def varint(value):
    content = b""
    while value > 127:
        content, value = content + bytes([value & 127 | 128]), value >> 7
    return content + bytes([value])


PIECE = message((1, b"a"), (2, -1.0))
KEEP_SPACES = (3, message((4, 0)))
FILES = {
    "empty": (b"", "it has no pieces"),
    "text": (b"IQ== 0\nIg== 1\n", "ends too early|a field of type|no pieces"),
    "no text": (message((1, b"")), "a piece is damaged"),
    "an empty text": (message((1, message((1, b"")))), "a piece of 0 characters"),
    "not UTF-8": (message((1, message((1, b"\xff")))), "invalid start byte"),
    "twice": (message((1, PIECE), (1, PIECE)), "the piece 'a' is there twice"),
    "a score": (message((1, message((1, b"a"), (2, float("nan"))))), "the score nan"),
    "a score of text": (message((1, message((1, b"a"), (2, b"x")))), "a piece is damaged"),
    "a long piece": (message((1, message((1, b"a" * 1_001)))), "a piece of 1,001 characters"),
    "truncated": (message((1, PIECE))[:-1], "ends too early"),
    "a long number": (b"\xff" * 11, "ends too early"),
    "groups": (bytes([1 << 3 | 3]), "a field of type 3"),
    "words": (message((1, PIECE), (2, message((3, 3))), KEEP_SPACES), "of words or characters"),
    "merged spaces": (message((1, PIECE)), "one that moves or merges spaces"),
    "a setting": (message((1, PIECE), (3, message((4, b"x")))), "a setting is not an integer"),
    "rules": (message((1, PIECE), (3, message((2, b"xx"), (4, 0)))), "no tokenizer can be built"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_models_are_refused_in_one_line(tmp_path, name):
    content, expected = FILES[name]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        build_tokenizer(path, {})
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()


def test_the_number_of_pieces_is_bounded(tmp_path, monkeypatch):
    path = FOLDER / "bpe.model"
    assert len(read_sentencepiece(path).pieces) > 300
    for limit in ("MAX_PIECES", "MAX_CHARACTERS"):
        monkeypatch.setattr(sentencepiece_model, limit, 100)
        with pytest.raises(UserError, match=r"more than \d+ pieces"):
            read_sentencepiece(path)
        monkeypatch.undo()
