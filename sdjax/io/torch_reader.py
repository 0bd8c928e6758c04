"""Reader of the weights that PyTorch saved (`pytorch_model.bin`), one file or a sharded index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.io.links import member
from sdjax.io.safetensors_writer import DTYPE_CODES, MAX_NAME_LENGTH, MAX_TENSORS
from sdjax.io.stored_reader import StoredReader
from sdjax.io.tensor_reader import TensorInfo, check_listed, read_weight_map
from sdjax.io.torch_file import read_torch_file
from sdjax.io.torch_pickle import StoredTensor

TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"


class TorchReader(StoredReader):
    """Reader of the tensors in files of `torch.save`, which runs nothing that they contain."""

    def __init__(self, folder: Path, *, single: str = TORCH_SINGLE):
        """Open a folder.

        Args:
            folder: a folder with an index or a single file.
            single: name of the file if there is no index.

        Raises:
            UserError: a damaged or missing file, or one that contains anything but tensors.
        """
        self.folder = folder
        self._tensors: dict[str, StoredTensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        index = member(folder, TORCH_INDEX)
        if not index.exists():
            self._open(single)
            return
        weight_map = read_weight_map(index)
        for file in sorted(set(weight_map.values())):
            check_listed(index, weight_map, file, self._open(file))
        if missing := weight_map.keys() - self._infos.keys():
            name = min(missing)
            raise UserError(
                f"{folder / weight_map[name]}: the tensor {name!r} is not in this file though "
                f"{TORCH_INDEX} lists it; copy the file again"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._infos))

    def infos(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """Return the shape, dtype and offset of all tensors."""
        return self._infos

    def path(self, name: str) -> Path:
        """Return the file of a tensor."""
        return member(self.folder, self._file_of[name])

    def strides(self, name: str) -> tuple[int, ...]:
        """Return the steps between the elements along each axis, in elements."""
        return self._tensors[name].strides

    def _open(self, file: str) -> list[str]:
        """Add the tensors of a file and return their names."""
        path = member(self.folder, file)
        tensors, offsets = read_torch_file(path)
        longest = max(map(len, tensors), default=0)
        if len(tensors) > MAX_TENSORS or longest > MAX_NAME_LENGTH:
            raise UserError(
                f"{path}: has {len(tensors):,} tensors with names of up to {longest:,} characters, "
                "which no model has; check that it is the right file"
            )
        for name, tensor in tensors.items():
            offset = offsets[tensor.storage.key] + tensor.offset * tensor.dtype.itemsize
            self._tensors[name], self._file_of[name] = tensor, file
            self._infos[name] = TensorInfo(tensor.shape, tensor.dtype, offset)
            if tensor.dtype not in DTYPE_CODES:
                raise self.unsupported(name, tensor.dtype.name)
        return list(tensors)
