"""Reader of a model's tensors with a PEFT adapter merged into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.peft import LoraPair, PeftAdapter
from sdjax.io.tensor_reader import TensorInfo, TensorReader, allocated
from sdjax.io.weights import open_model_weights
from sdjax.xla.alignment import Allocate, aligned_empty


class AdaptedReader(TensorReader):
    """Reader of a model's tensors with an adapter merged in.

    An adapted tensor is W + scale * B @ A, computed in float32 and rounded once to W's dtype. With
    DoRA, each of its outputs (or each column of an embedding) is then scaled to the stored norm.
    """

    def __init__(self, model: TensorReader, adapter: Path):
        """Open an adapter for a model.

        Args:
            model: reads the model's tensors.
            adapter: folder of the adapter.

        Raises:
            UserError: not a LoRA adapter, not supported or for another model.
        """
        self.folder = model.folder
        self._model = model
        self._adapter = PeftAdapter(adapter)
        self._adapter.resolve(model)
        self._adapter.check(model.names, model.folder)

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes or replaces."""
        return frozenset(self._adapter.pairs) | frozenset(self._adapter.replacements)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the model and of the adapter."""
        return (*self._model.folders, *self._adapter.reader.folders)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on how tensors are converted while they are read."""
        return self._model.notes

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names of the model, sorted."""
        return self._model.names

    def infos(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """Return the shape and dtype of at least these tensors."""
        return self._model.infos(names)

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        adapter = f" with {self._adapter.reader.folder}" if name in self.adapted else ""
        return self._model.where(name) + adapter

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor, with the adapter merged in."""
        if name not in self.adapted:
            return self._model.read(name, allocate)
        array = allocated(allocate, self.infos([name])[name], self.where(name))
        array[...] = self.read_box(name, (slice(None),) * array.ndim)
        return array

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # callers check the result
    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis."""
        adapter = self._adapter
        if (pair := adapter.pairs.get(name)) is None:
            return self._unadapted(name, box)
        a, b = adapter.read_factors(pair)
        self._check_update(name, pair, a, b)
        if pair.magnitude is None:
            weights = self._unadapted(name, box)
            return (weights.astype(np.float32) + _change(pair, a, b, box)).astype(weights.dtype)
        # The norms are those of whole rows, or of whole columns of a transposed matrix.
        axis = 0 if pair.transposed else 1
        whole = (slice(None), box[1]) if pair.transposed else (box[0], slice(None))
        weights = self._unadapted(name, whole)
        changed = weights.astype(np.float32) + _change(pair, a, b, whole)
        norms = np.sqrt(np.square(changed).sum(axis, keepdims=True))
        magnitude = adapter.reader.read(pair.magnitude).astype(np.float32).reshape(-1)
        if magnitude.size != len(b):
            raise self._wrong_shape(pair.magnitude, (magnitude.size,), name)
        factors = np.expand_dims(magnitude[box[1 - axis]], axis) / norms
        part = (box[0], slice(None)) if pair.transposed else (slice(None), box[1])
        return (factors * changed[part]).astype(weights.dtype)

    def _unadapted(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor of the model, or of its replacement in the adapter."""
        stored = self._adapter.replacements.get(name)
        if stored is None:
            return self._model.read_box(name, box)
        if (shape := self._adapter.reader.shape(stored)) != self.shape(name):
            raise self._wrong_shape(stored, shape, name)
        return self._adapter.reader.read_box(stored, box).astype(self.dtype(name))

    def _check_update(self, name: str, pair: LoraPair, a: np.ndarray, b: np.ndarray) -> None:
        sizes = (a.shape[1], len(b)) if pair.transposed else (len(b), a.shape[1])
        shape = sizes if pair.experts is None else (pair.experts, *sizes)
        if shape != self.shape(name):
            raise self._wrong_shape(pair.a, shape, name)

    def _wrong_shape(self, stored: str, shape: tuple[int, ...], name: str) -> UserError:
        return UserError(
            f"{self._adapter.reader.where(stored)} has an update of shape {list(shape)}, but "
            f"{name} has shape {list(self.shape(name))}; use the model that it was trained for"
        )


def open_weights(folder: Path, adapter: Path | None = None) -> TensorReader:
    """Open the weights of a model, in any supported format.

    Args:
        folder: folder of the model.
        adapter: folder of a PEFT adapter that is merged into the weights as they are read.

    Raises:
        UserError: no weights, damaged ones, or an adapter that is not supported or belongs to
            another model.
    """
    model = open_model_weights(folder)
    return model if adapter is None else AdaptedReader(model, adapter)


def _change(pair: LoraPair, a: np.ndarray, b: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """Return a part of the change of a tensor.

    Args:
        pair: how the factors are stored.
        a: [rank, in], or [experts * rank, in].
        b: [out, rank], or [out, rank * experts].
        box: the part, one slice per axis.
    """
    *experts, first, second = box
    rows, columns = (second, first) if pair.transposed else (first, second)
    if pair.experts is None:
        change = pair.scale * (b[rows] @ a[:, columns])
    else:
        a = a.reshape(pair.experts, -1, a.shape[1])[experts[0]][..., columns]
        b = b.reshape(len(b), -1, pair.experts).transpose(2, 0, 1)[experts[0], rows]
        change = pair.scale * (b @ a)
    return change.swapaxes(-1, -2) if pair.transposed else change
