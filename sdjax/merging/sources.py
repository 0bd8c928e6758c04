"""A folder of safetensors, read tensor by tensor under Hugging Face's names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sdjax.errors import UserError


class Source:
    """One model's folder: ``model.safetensors``, or shards and ``model.safetensors.index.json``."""

    def __init__(self, folder: Path) -> None:
        """Opens every file and reads its header. Raises UserError that names folder or file."""
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"no model folder {folder}; give a folder with config.json")
        self._files: dict[Path, safe_open] = {}
        self._where: dict[str, Path] = {}
        for file in _weight_files(folder):
            try:
                opened = safe_open(file, framework="numpy")
                names = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read: it is cut short or no safetensors file ({error})"
                ) from error
            self._files[file] = opened
            self._where.update(dict.fromkeys(names, file))
        self.names = tuple(sorted(self._where))
        self.shapes = {name: self._shape(name) for name in self.names}

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype it is stored in (bfloat16 as ml_dtypes')."""
        file = self._where[name]
        try:
            return self._files[file].get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise UserError(f"{file}: tensor {name} cannot be read ({error})") from error

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())


def check_match(reference: Source, other: Source) -> None:
    """Raises UserError unless both have the same tensors with the same shapes."""
    missing = sorted(set(reference.names) - set(other.names))
    surplus = sorted(set(other.names) - set(reference.names))
    if missing or surplus:
        word, name = ("lacks", missing[0]) if missing else ("has", surplus[0])
        beside = "which is in" if missing else "which is not in"
        raise UserError(f"{other.folder} {word} tensor {name}, {beside} {reference.folder}")
    for name, shape in reference.shapes.items():
        if other.shapes[name] != shape:
            raise UserError(
                f"tensor {name} has shape {list(other.shapes[name])} in {other.folder}, "
                f"{list(shape)} in {reference.folder}"
            )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors files ({error})") from error
        files = [folder / name for name in sorted(names)]
        for file in files:
            if file.parent != folder or not file.exists():
                raise UserError(f"{index} names {file.name}, which is not in the folder")
        return files
    if single.exists():
        return [single]
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json")
