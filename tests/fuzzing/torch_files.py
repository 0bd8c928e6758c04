"""Weights in PyTorch's format, written without PyTorch."""

import io
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


def torch_file(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the file that torch.save writes for a dict of contiguous tensors."""
    storages = {f"data/{i}": array.tobytes() for i, array in enumerate(tensors.values())}
    entries = {"data.pkl": torch_pickle(tensors), "byteorder": b"little", **storages}
    return archive({f"model/{name}": content for name, content in entries.items()})


def torch_pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle of a dict of contiguous tensors, whose storages are 0, 1 and so on."""
    items = b""
    for key, (name, array) in enumerate(tensors.items()):
        steps = [stride // array.itemsize for stride in array.strides]
        items += _text(name) + _name("torch._utils", "_rebuild_tensor_v2") + b"("
        items += b"(" + _text("storage") + _name("torch", STORAGES[array.dtype])
        items += _text(str(key)) + _text("cpu") + _integer(array.size) + b"tQ"
        items += _integer(0) + _tuple(array.shape) + _tuple(steps) + b"\x89"
        items += _name("collections", "OrderedDict") + b")RtR"
    return b"\x80\x02}(" + items + b"u."


def archive(entries: Mapping[str, bytes]) -> bytes:
    """Return an uncompressed zip archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(name), data)
    return content.getvalue()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _integer(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple(numbers) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"
