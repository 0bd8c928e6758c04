"""Checks of a tokenizer's settings, before transformers reads them.

transformers takes the class of a tokenizer, its arguments and paths of files from
tokenizer_config.json, special_tokens_map.json and config.json. In a folder from someone else, each
of them might name something outside the folder, or a class that is not a tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.links import member
from sdjax.io.safetensors_reader import read_json

SPECIAL_TOKENS = "special_tokens_map.json"
# Tokenizer classes that use tokenizer.json as it is.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")

_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Arguments of tokenizer classes that transformers may take for files, or that are never saved.
_LOADING_SETTINGS = ("gguf_file", "init_inputs", "mecab_kwargs", "merges", "vocab")
# These load further tokenizers or dictionaries.
_EXCLUDED_CLASSES = ("RagTokenizer", "BertJapaneseTokenizer", "MistralCommonBackend")


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if a setting has a wrong type, or would have a file elsewhere read.

    Args:
        settings: content of tokenizer_config.json.
        path: the file.
    """

    def is_token(value: Any) -> bool:
        # Flags such as `add_bos_token` are booleans.
        return value is None or isinstance(token_text(value), str | bool)

    def is_token_list(value: Any) -> bool:
        items = value.values() if isinstance(value, dict) else value
        return value is None or (isinstance(value, list | dict) and all(map(is_token, items)))

    def is_template(value: Any) -> bool:
        if value is None or isinstance(value, str):
            return True
        return isinstance(value, list) and all(
            isinstance(item, dict)
            and isinstance(item.get("name"), str)
            and isinstance(item.get("template"), str)
            for item in value
        )

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        name: (is_token, "a token") for name in settings if name.endswith("_token")
    }
    for name in ("extra_special_tokens", "additional_special_tokens"):
        checks[name] = is_token_list, "a list or mapping of tokens"
    checks["added_tokens_decoder"] = (
        lambda value: value is None or (isinstance(value, dict) and is_token_list(value)),
        "a mapping of ids to tokens",
    )
    checks["chat_template"] = is_template, "a template, or a list with name and template"
    for name, (is_valid, expected) in checks.items():
        if not is_valid(settings.get(name)):
            shown = truncated_repr(settings[name])
            raise UserError(f"{path}: {name} must be {expected}, not {shown}; copy the file again")
    for name in _LOADING_SETTINGS:
        if settings.get(name):
            raise _refused(path, name, settings[name], "may make transformers read other files")
    files = settings.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or not all(
        isinstance(file, str) and "/" not in file and member(path.parent, file) for file in files
    ):
        raise _refused(
            path, "fast_tokenizer_files", files, "must list names of files in this folder"
        )
    options = settings.get("sp_model_kwargs") or {}
    if not isinstance(options, dict) or any(
        not isinstance(value, int | float) for value in options.values()
    ):
        raise _refused(path, "sp_model_kwargs", options, "must be a mapping of numbers")


def check_special_tokens(folder: Path) -> None:
    """Raise UserError unless special_tokens_map.json contains nothing but tokens.

    transformers passes all of its keys to the tokenizer, also `tokenizer_file`.

    Args:
        folder: folder of a tokenizer.
    """
    path = folder / SPECIAL_TOKENS
    settings = read_json(path)
    for name, value in settings.items():
        if not name.endswith("_token") and name not in _TOKEN_LISTS:
            raise _refused(path, name, value, "is not a special token")
    check_settings(settings, path)


def check_class(settings: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless the class that settings name is a tokenizer of transformers.

    transformers would take any of its attributes: a model is built with its weights, which may be
    a pickle.

    Args:
        settings: content of tokenizer_config.json or config.json.
        path: the file.
    """
    name = settings.get("tokenizer_class")
    if name is None:
        return
    if not isinstance(name, str) or name.removesuffix("Fast") not in _known_classes():
        shown = truncated_repr(name)
        raise UserError(
            f"{path}: tokenizer_class {shown} is not a tokenizer class that sdjax loads; use "
            "'PreTrainedTokenizerFast' with a tokenizer.json"
        )


def config_of_type(model_config: Mapping[str, Any]) -> Any:
    """Return transformers' default config of a model type, which selects the tokenizer's class.

    Values of config.json, such as a number of layers, might make transformers fill the memory.

    Args:
        model_config: content of config.json.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    model_type = model_config.get("model_type")
    config: Any = PreTrainedConfig()
    if isinstance(model_type, str):
        config = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else config
        config.model_type = model_type
    config.tokenizer_class = model_config.get("tokenizer_class")
    return config


@functools.cache
def _known_classes() -> frozenset[str]:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    names |= {*PLAIN_CLASSES, "BloomTokenizer", "CodeGenTokenizer", "LlamaTokenizer"}
    return frozenset(name.removesuffix("Fast") for name in names if name not in _EXCLUDED_CLASSES)


def _refused(path: Path, name: str, value: Any, reason: str) -> UserError:
    shown = f"{truncated_repr(name)} ({truncated_repr(value)})"
    return UserError(f"{path}: {shown} {reason}; remove it")


def token_text(token: Any) -> str | None:
    """Return the text of a token in a config, which is the text or a dict with `content`."""
    return token.get("content") if isinstance(token, dict) else token
