"""Files next to the weights of a model folder: those of its tokenizer, and all others."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.core.files import MAX_VOCABULARY_BYTES
from sdjax.io.links import member

# A tokenizer's vocabulary in its own format, which tokenizer.json repeats.
_VOCABULARY = re.compile(
    r"tokenizer\.model.*|vocab\..*|merges\.txt|added_tokens\.json|spiece\.model"
    r"|sentencepiece.*\.model|.*\.tiktoken|tekken\.json"
)
_CHAT_TEMPLATES = re.compile(r"chat_template\.\w+|additional_chat_templates/.*\.jinja")
_TOKENIZER = re.compile(
    rf"{_VOCABULARY.pattern}|{_CHAT_TEMPLATES.pattern}"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|tokenization_\w+\.py"
)
# Generation settings, processors of images, videos and sound, and custom code of the model.
_OTHER = re.compile(
    r"generation_config\.json|.*(processor|feature_extractor)\w*\.json"
    r"|(modeling|configuration|processing|image_processing|video_processing|feature_extraction)"
    r"_\w+\.py"
)
# Files that a merge replaces or that say nothing of how a model is used: config, weights, adapters,
# texts, pictures and records of training.
_REPLACED = re.compile(
    r"\..*|config\.json|.*\.index\.json|adapter_.*|(README|LICEN[CS]E|NOTICE|USE_POLICY).*"
    r"|recipe\.yaml|program\.py|mergekit_config\.yml|(trainer_state|training_args|\w*results)\..*"
    r"|.*\.(safetensors|bin|pth?|gguf|h5|msgpack|onnx|npz|npy|md|txt|png|jpe?g|gif|webp|svg|pdf)"
)
# Formats of the files that transformers' tokenizer classes read.
_READ_SUFFIXES = frozenset(
    (".json", ".jinja", ".txt", ".model", ".tiktoken", ".codes", ".tokenizer")
)


def check_files(folder: Path) -> None:
    """Check all files of a model's folder, since a library may read a file of any name.

    Args:
        folder: the folder.

    Raises:
        UserError: a file is a link that leads out of the folder, or too large for a tokenizer's.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        member(folder, path.relative_to(folder).as_posix())
        size = path.stat().st_size if path.is_file() else 0  # not a file: a link to itself
        if path.suffix in _READ_SUFFIXES and size > MAX_VOCABULARY_BYTES:
            raise UserError(f"{path}: too large ({size:,} bytes); remove the file")


def tokenizer_files(
    folder: Path, *, vocabulary: bool = True, chat_templates: bool = True
) -> list[str]:
    """Return the files of a tokenizer, relative to its folder.

    Args:
        folder: the folder.
        vocabulary: include those that repeat the vocabulary of tokenizer.json.
        chat_templates: include chat templates in files of their own.

    Raises:
        UserError: one of them is a link that leads out of the folder.
    """
    return [
        name
        for name in _files(folder, _TOKENIZER)
        if (vocabulary or not _VOCABULARY.fullmatch(name))
        and (chat_templates or not _CHAT_TEMPLATES.fullmatch(name))
    ]


def other_files(folder: Path) -> list[str]:
    """Return the files that belong to a model besides its config, weights and tokenizer.

    Raises:
        UserError: one of them is a link that leads out of the folder.
    """
    return _files(folder, _OTHER)


def dropped_files(folder: Path, copied: Collection[str], *, known: bool) -> list[str]:
    """Return the files of a model's folder that a merged model lacks.

    Args:
        folder: the folder.
        copied: names of the files that the merged model has.
        known: only files that belong to a model, such as a processor's.
    """
    if known:
        names = [*tokenizer_files(folder, vocabulary=False), *other_files(folder)]
    else:
        paths = (path for path in folder.iterdir() if path.is_file())
        names = [path.name for path in paths if not _REPLACED.fullmatch(path.name)]
    return sorted(name for name in names if name not in copied)


def _files(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(
        name for name in names if pattern.fullmatch(name) and member(folder, name).is_file()
    )
