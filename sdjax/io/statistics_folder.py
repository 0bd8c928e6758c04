"""Folders of statistics of a model on data: safetensors, and a manifest.

The names of the statistics are explained in `sdjax.merging.statistics`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.model_paths import ZOO, hub_model, locate
from sdjax.io.safetensors_reader import SafetensorsReader, read_json
from sdjax.io.safetensors_writer import is_finite

MANIFEST = "statistics.json"
SUFFIX = ".stats"


class StatisticsFolder(Mapping[str, np.ndarray]):
    """Statistics of a model, which are read from their files when they are looked up.

    Attributes:
        folder: the folder.
        manifest: how they were computed: model, data, numbers of examples and tokens, digest of
            the weights.
    """

    def __init__(self, folder: Path):
        """Open a folder that `sdjax stats` has written.

        Raises:
            UserError: the folder does not exist or is damaged.
        """
        self.folder = folder
        self.manifest = read_json(folder / MANIFEST) if folder.is_dir() else {}
        if not self.manifest:
            raise UserError(
                f"{folder}: no statistics; compute them with `sdjax stats MODEL --data FILE`"
            )
        self._reader = SafetensorsReader(folder)
        self._infos = self._reader.infos(self._reader.names)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read a statistic.

        Raises:
            UserError: the file is truncated, or has NaN or infinity.
        """
        if name not in self._infos:
            raise KeyError(name)
        array = self._reader.read(name)
        if not is_finite(array):
            raise UserError(
                f"{self._reader.where(name)} contains NaN or infinity; compute the statistics again"
            )
        return array

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._reader.names)

    def __len__(self) -> int:
        """Return the number of statistics."""
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a statistic of this name; nothing is read."""
        return name in self._infos

    @functools.cached_property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of all statistics by name; nothing is read."""
        infos = self._infos
        return {name: jax.ShapeDtypeStruct(infos[name].shape, infos[name].dtype) for name in self}


def load_stats(folder: str | Path) -> Mapping[str, Any]:
    """Open the statistics that `sdjax stats` has written, for `sdjax.merge(..., stats=)`.

    Args:
        folder: the folder, MODEL.stats by default.

    Returns:
        A mapping from name to array, which reads an array when it is looked up.

    Raises:
        UserError: the folder does not exist or is damaged.

    Examples:
        >>> import sdjax
        >>> try:
        ...     stats = sdjax.load_stats("reader.stats")
        ... except sdjax.core.errors.UserError as error:
        ...     print(error)
        reader.stats: no statistics; compute them with `sdjax stats MODEL --data FILE`
    """
    return StatisticsFolder(Path(folder).expanduser())


def default_folder(model: str, relative_to: Path | None = None) -> Path | None:
    """Return the folder next to a model where its statistics are looked for and written.

    Args:
        model: a name as in `sdjax.load_model`, also MODEL+ADAPTER, whose place is next to ADAPTER.
        relative_to: folder that is searched before the working directory.

    Returns:
        The folder, which need not exist; None for models of the package and of Hugging Face's
        cache, next to which nothing is written.
    """
    folder, adapter = locate(model, relative_to=relative_to)
    place = Path(os.path.realpath(adapter or folder))
    if hub_model(place) is not None or place.is_relative_to(os.path.realpath(ZOO)):
        return None
    return place.with_name(place.name + SUFFIX)
