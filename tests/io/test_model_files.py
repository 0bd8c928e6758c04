"""Files next to the weights of a model."""

import os

import pytest

from sdjax.core.errors import UserError
from sdjax.core.files import MAX_VOCABULARY_BYTES
from sdjax.io.model_files import check_files, other_files, tokenizer_files

TOKENIZER = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
VOCABULARY = ["qwen.tiktoken", "spiece.model", "tekken.json", "tokenizer.model", "vocab.txt"]
TEMPLATES = ["additional_chat_templates/rag.jinja", "chat_template.jinja", "chat_template.json"]
OTHER = [
    "configuration_x.py",
    "generation_config.json",
    "modeling_x.py",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
]
NEITHER = [
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "program.py",
    "pytorch_model.bin",
    "recipe.yaml",
    "trainer_state.json",
    "training_args.bin",
    "onnx/tokenizer.json",
]


def test_files_of_a_model_are_the_tokenizers_or_others(tmp_path):
    for name in (*TOKENIZER, *VOCABULARY, *TEMPLATES, *OTHER, *NEITHER):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert tokenizer_files(tmp_path) == sorted([*TOKENIZER, *VOCABULARY, *TEMPLATES])
    assert tokenizer_files(tmp_path, vocabulary=False) == sorted([*TOKENIZER, *TEMPLATES])
    assert tokenizer_files(tmp_path, chat_templates=False) == sorted([*TOKENIZER, *VOCABULARY])
    assert other_files(tmp_path) == OTHER


def test_files_of_a_tokenizer_are_limited_in_size(tmp_path):
    (tmp_path / "loop.json").symlink_to("loop.json")  # cannot be read
    for name in ("model.safetensors", "training.jsonl", "other.json"):
        (tmp_path / name).write_text("")
        os.truncate(tmp_path / name, MAX_VOCABULARY_BYTES + 1)
    with pytest.raises(UserError, match=r"other\.json: too large \(150,000,001 bytes\)"):
        check_files(tmp_path)
    (tmp_path / "other.json").unlink()
    check_files(tmp_path)
