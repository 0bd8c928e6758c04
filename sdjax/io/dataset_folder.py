"""Checks of a local folder that the `datasets` library reads, which may come from someone else.

The library follows what README.md, .huggingface.yaml and the files of some formats say: to files
outside the folder and to addresses on the network. Therefore only plain formats, and settings that
stay in the folder, are accepted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import MAX_TEXT_BYTES, read_json_file, read_text
from sdjax.core.yaml import YamlDocument
from sdjax.io.links import member

README = "README.md"
SETTINGS = ".huggingface.yaml"
INFOS = "dataset_infos.json"

# Formats that `datasets` decompresses, completely, into its cache.
_COMPRESSED = frozenset(
    (".7z", ".bz2", ".gz", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")
)
# Formats whose files may name other files or addresses, or are programs.
_REFERRING = frozenset((".eval", ".h5", ".hdf5", ".lance", ".pdb", ".toml", ".vortex", ".xml"))
_CONFIG_KEYS = frozenset(
    (
        *("config_name", "data_dir", "data_files", "default", "description", "features", "field"),
        *("sep", "version"),
    )
)


def check_data_folder(folder: Path) -> None:
    """Check a folder before the `datasets` library reads it.

    Args:
        folder: the folder.

    Raises:
        UserError: it contains a link that leads out of it, a compressed file or one that may name
            others, or settings that the library would follow out of the folder.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = member(folder, os.path.relpath(os.path.join(parent, name), folder))
            suffix = path.suffix.lower()
            if suffix in _COMPRESSED:
                raise UserError(
                    f"{path}: compressed data may expand to any size; decompress it if you trust "
                    "it, or pass a .jsonl.gz file by its own name"
                )
            if suffix in _REFERRING:
                raise UserError(
                    f"{path}: files of this format may name files elsewhere; use .jsonl, .csv or "
                    ".parquet"
                )
    for path in (folder / README, folder / SETTINGS):
        if path.exists():
            _check_settings(path)
    if (folder / INFOS).exists():
        read_json_file(folder / INFOS)


def check_columns(features: Mapping[str, Any], path: str) -> None:
    """Raise UserError for columns that `datasets` decodes, since their values may be paths or URLs.

    Args:
        features: features of a dataset by column.
        path: the dataset, for the message.
    """
    from datasets.features.features import require_decoding

    for name, feature in features.items():
        if require_decoding(feature, ignore_decode_attribute=True):
            raise UserError(
                f"{path}: the column {truncated_repr(name)} has files such as images, which may "
                "be anywhere; use a dataset of text and numbers"
            )


def _check_settings(path: Path) -> None:
    """Raise UserError if the configurations in a file name data outside its folder."""
    text = read_text(path, MAX_TEXT_BYTES)
    if path.name == README:
        from huggingface_hub.repocard import REGEX_YAML_BLOCK

        block = REGEX_YAML_BLOCK.search(text)
        text = block[2] if block else ""
    document = YamlDocument(text, str(path), show_lines=path.name != README)
    settings = {} if document.root is None else document.value(document.root)
    configs = settings.get("configs") if isinstance(settings, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict):
            continue
        for key, value in config.items():
            if key not in _CONFIG_KEYS:
                raise UserError(
                    f"{path}: {truncated_repr(key)} is not supported in `configs`; remove it, or "
                    "pass a .jsonl file by its own name"
                )
            if key in ("data_files", "data_dir"):
                _check_patterns(value, path)


def _check_patterns(value: Any, path: Path) -> None:
    """Raise UserError unless all text in `data_files` may name files in the folder only."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            pending += item.values() if isinstance(item, dict) else item
        elif isinstance(item, str):
            parts = PurePosixPath(item).parts
            if item.startswith(("/", "~")) or ".." in parts or ":" in item or "\\" in item:
                raise UserError(
                    f"{path}: data_files may not name {truncated_repr(item)}, which is not in this "
                    "folder; remove it, or pass a .jsonl file by its own name"
                )
