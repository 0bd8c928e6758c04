"""Reader of the weights that PyTorch saved (`pytorch_model.bin`), one file or a sharded index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.io.links import member
from sdjax.io.safetensors_writer import MAX_NAME_LENGTH, MAX_TENSORS, STORED_DTYPES
from sdjax.io.stored_reader import Place, StoredReader
from sdjax.io.tensor_reader import TensorInfo, locate_tensors, unsupported
from sdjax.io.torch_file import read_torch_file

TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"


class TorchReader(StoredReader):
    """Reader of the tensors in files of `torch.save`, which runs nothing that they contain."""

    def __init__(self, folder: Path, *, single: str = TORCH_SINGLE):
        """Open a folder.

        Args:
            folder: a folder with an index or a single file.
            single: name of the only file of a model without an index.

        Raises:
            UserError: a damaged or missing file, or one that contains anything but tensors.
        """

        def open_file(file: str) -> dict[str, Place]:
            return {place.name: place for place in _places(member(folder, file))}

        super().__init__(folder, locate_tensors(folder, TORCH_INDEX, single, open_file))


def _places(path: Path) -> Iterator[Place]:
    """Yield the places of the tensors in a file."""
    tensors, offsets = read_torch_file(path)
    longest = max(map(len, tensors), default=0)
    if len(tensors) > MAX_TENSORS or longest > MAX_NAME_LENGTH:
        raise UserError(
            f"{path}: has {len(tensors):,} tensors with names of up to {longest:,} characters, "
            "which no model has; check that it is the right file"
        )
    for name, tensor in tensors.items():
        place = Place(
            name=name,
            path=path,
            offset=offsets[tensor.storage.key] + tensor.offset * tensor.dtype.itemsize,
            info=TensorInfo(tensor.shape, tensor.dtype),
            strides=tensor.strides,
        )
        if tensor.dtype not in STORED_DTYPES.values():
            raise unsupported(place.where, tensor.dtype.name)
        yield place
