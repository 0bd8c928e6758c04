"""Weights that torch.save wrote, read without PyTorch; and files that are not such weights."""

import contextlib
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.io.torch_pickle import PickleError, load_pickle, tensors_of
from sdjax.io.torch_reader import TorchReader
from sdjax.io.weights import open_model_weights
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.testing import tiny_model


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def state(torch):
    """Return tensors of every dtype, some of them views of one another."""
    numbers = torch.arange(24.0).reshape(2, 3, 4) / 7
    matrix = torch.arange(20, dtype=torch.float64).reshape(4, 5)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with metadata
    state |= {f"as {d}": numbers.to(d) for d in (torch.bfloat16, torch.float16, torch.float32)}
    state |= {
        "double": matrix,
        "transposed": matrix.T,
        "rows": matrix[1:3],
        "columns": matrix[:, 1:4],
        "every other": matrix[::2, ::2],
        "permuted": numbers.permute(2, 0, 1),
        "tied": numbers,
        "parameter": torch.nn.Parameter(numbers * 2),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "one row": matrix[:1].T,
        "mask": torch.tensor([[True, False]]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "small": torch.tensor([-1, 5], dtype=torch.int8),
        "short": torch.tensor([-300], dtype=torch.int16),
        "int": torch.tensor([2**31 - 1], dtype=torch.int32),
        "unsigned": torch.tensor([65_535], dtype=torch.uint16),
    }
    return state


def as_numpy(tensor):
    import ml_dtypes
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_equal_those_of_torch(torch, state, tmp_path, options, protocol, monkeypatch):
    if options:  # the old format has no unsigned integers but bytes
        state = {name: tensor for name, tensor in state.items() if name != "unsigned"}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, pickle_protocol=protocol, **options)
    reader = TorchReader(tmp_path)
    assert reader.names == tuple(sorted(state))
    for limit in (2**24, 48):  # blocks of a few rows
        monkeypatch.setattr("sdjax.io.stored_reader.MAX_BLOCK_BYTES", limit)
        for name, tensor in state.items():
            expected = as_numpy(tensor)
            assert (reader.shape(name), reader.infos([name])[name].dtype) == (
                expected.shape,
                expected.dtype,
            )
            np.testing.assert_array_equal(reader.read(name), expected)
            box = tuple(slice(min(1, size - 1), size) for size in expected.shape)
            np.testing.assert_array_equal(reader.read_box(name, box), expected[box])


def in_torch_files(torch, model, tmp_path, *, shards=1):
    """Replace the safetensors of a model by one or more files of torch.save."""
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, model / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = names[shard::shards]
        torch.save({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_the_same_in_both_formats(torch, tmp_path, shards):
    config, params = tiny_model()
    write_model(tmp_path / "model", config, params)
    in_torch_files(torch, tmp_path / "model", tmp_path, shards=shards)
    loaded_config, loaded = load_model(tmp_path / "model")
    assert loaded_config == config
    expected = flatten(params)
    assert flatten(loaded).keys() == expected.keys()
    for path, leaf in flatten(loaded).items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_damaged_indexes_of_torch_files_are_refused(torch, tmp_path):
    config, params = tiny_model()
    model = tmp_path / "model"
    write_model(model, config, params)
    in_torch_files(torch, model, tmp_path, shards=2)
    index = model / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name, file = sorted(weight_map.items())[0]
    for changed, message in (
        ({**weight_map, "more": file}, "'more' is not in this file though"),
        ({n: f for n, f in weight_map.items() if n != name}, "does not list the tensor"),
        ({**weight_map, name: "gone.bin"}, "listed in .* but missing"),
        ({**weight_map, name: "../x.bin"}, "is not the name of a file in this folder"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UserError, match=message):
            open_model_weights(model)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0%b"
    b"X\x03\0\0\0cpuK\x06tQ%b\x89ccollections\nOrderedDict\n)Rt R"
).replace(b" ", b"")
WHOLE = b"K\0K\x02K\x03\x86K\x03K\x01\x86"  # offset 0, shape (2, 3), strides (3, 1)


def of_tensor(place=WHOLE, key=b"0", name=b"a"):
    return b"\x80\x02}X\x01\0\0\0" + name + TENSOR % (key, place) + b"s."


def archive(folder, content, *, storage=b"\0" * 24, compression=zipfile.ZIP_STORED, **others):
    files = {"m/data.pkl": content, "m/data/0": storage, "m/byteorder": b"little"}
    files |= {f"m/{name}": data for name, data in others.items()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return folder / "pytorch_model.bin"


def test_a_file_written_by_hand(tmp_path):
    """Without torch: a 2 x 3 matrix and its transpose in one storage of six floats."""
    numbers = np.arange(6, dtype=np.float32)
    transposed = b"K\0K\x03K\x02\x86K\x01K\x03\x86"
    content = of_tensor()[:-1] + of_tensor(transposed, name=b"b")[3:]
    archive(tmp_path, content, storage=numbers.tobytes())
    reader = TorchReader(tmp_path)
    np.testing.assert_array_equal(reader.read("a"), numbers.reshape(2, 3))
    np.testing.assert_array_equal(reader.read("b"), numbers.reshape(2, 3).T)


# A tuple whose repr has 10^12 elements, in memo 12; and a tuple of 20,000 levels.
EXPANDING = b"K\1q\0" + b"".join(
    b"(" + b"h" + (b"%ch" % level) * 9 + b"%ctq%c" % (level, level + 1) for level in range(12)
)
DEEP = b")" + b"\x85" * 20_000
NESTED = {"a huge tuple": EXPANDING, "a deep tuple": DEEP}


def of_nested(value):
    """Return pickles with a nested value in every place that its reader looks at."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n%bX\x03\0\0\0cpu%btQ"
    zero = b"X\x01\0\0\x000"
    return {
        "module": b"\x80\x02" + value + b"X\x01\0\0\0x\x93.",
        "name": b"\x80\x02X\x01\0\0\0x" + value + b"\x93.",
        "value": b"\x80\x02" + value + b".",
        "item": b"\x80\x02}X\x01\0\0\0a" + value + b"s.",
        "key": b"\x80\x02}" + value + b"K\1s.",
        "function": b"\x80\x02" + value + b")R.",
        "arguments": b"\x80\x02ctorch\nSize\n" + value + b"R.",
        "state": b"\x80\x02}" + value + b"b.",
        "storage": b"\x80\x02" + value + b"Q.",
        "storage key": b"\x80\x02" + storage % (value, b"K\6") + b".",
        "storage size": b"\x80\x02" + storage % (zero, value) + b".",
        "offset": of_tensor(value + WHOLE[2:]),
        "shape": of_tensor(b"K\0" + value + WHOLE[7:]),
        "size": of_tensor(b"K\0(" + value + b"tK\1\x85"),
        "stride": of_tensor(b"K\0K\1\x85(" + value + b"t"),
    }


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("place", of_nested(b""))
def test_nested_values_are_refused_by_their_kind(kind, place):
    content = of_nested(NESTED[kind])[place]
    with pytest.raises(PickleError) as error:
        tensors_of(load_pickle(content)[0])
    assert len(str(error.value)) < 120


PICKLES = {
    "a call": (pickle.dumps({"a": Call(os.system, "touch hacked")}, 2), r"posix\.system"),
    "a call of eval": (pickle.dumps({"a": Call(eval, "1")}, 2), "__builtin__.eval"),
    "a call in protocol 4": (pickle.dumps({"a": Call(eval, "1")}, 4), "builtins.eval"),
    "an object": (pickle.dumps({"a": np.float32(1)}, 2), "numpy"),
    "a dotted name": (b"\x80\x02ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"),
    "an extension": (b"\x80\x02\x82\x01.", "the operation"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "the operation"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "the operation"),
    "a class": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the operation"),
    "training state": (pickle.dumps({"epoch": 3}, 2), "'epoch', which is 3 and not a tensor"),
    "nested dicts": (pickle.dumps({"model": {}}, 2), "'model', which is a dict and not a tensor"),
    "a list": (pickle.dumps([1], 2), "a list instead of a dict"),
    "a number as a name": (b"\x80\x02}K\x01" + of_tensor()[9:], "the key 1"),
    "a tuple as a key": (pickle.dumps({(1,): 1}, 2), "a dict with a tuple as a key"),
    "itself": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "'a', which is a dict"),
    "truncated": (of_tensor()[:-9], "truncated|damaged"),
    "no stack": (b"\x80\x02R.", "damaged"),
    "no memo": (b"\x80\x02h\x05.", "damaged"),
    "endless": (b"\x80\x02" + b"]" * 1_000, "more than 500 operations|truncated"),
    "a huge text": (b"\x80\x02X\xff\xff\xff\xff", "truncated"),
    "a huge integer": (b"\x80\x02\x8a\xff" + b"\1" * 255 + b".", "an integer of 255 bytes"),
    "beyond the storage": (of_tensor(b"K\x01" + WHOLE[2:]), "beyond its storage"),
    "a negative stride": (of_tensor(WHOLE[:-3] + b"J\xff\xff\xff\xff\x86"), "the size -1"),
    "a fraction": (of_tensor(b"G" + struct.pack(">d", 0.5) + WHOLE[2:]), "the size 0.5"),
    "expanded": (
        of_tensor(b"K\0M\xff\xffM\xff\xff\x86K\0K\0\x86"),
        "that repeats its elements",
    ),
    "two shapes": (of_tensor(b"K\0K\x02K\x03\x86K\x03\x85"), "an unlikely shape"),
    "no elements, huge": (
        of_tensor(b"K\0K\0" + b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x86K\0K\0\x86"),
        "the size",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_anything_but_tensors_is_refused_in_one_line(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdjax.io.torch_pickle.MAX_STEPS", 500)
    content, message = PICKLES[name]
    path = archive(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        TorchReader(tmp_path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    assert not (tmp_path / "hacked").exists()
    path.write_bytes(content)  # the format before 1.6
    with pytest.raises(UserError):
        TorchReader(tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
        ({"storage": b"\0" * 23}, "shorter than its tensors"),
        ({"content": of_tensor(key=b"1")}, "no entry 'm/data/1'"),
        ({"content": of_tensor(key=b"\n")}, r"no entry 'm/data/\\n'"),
        ({"byteorder": b"big"}, "two entries"),
        ({"constants.pkl": b""}, "TorchScript, which is a program"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_archives_are_refused_in_one_line(tmp_path, options, message):
    options = dict(options)
    if "byteorder" in options:
        archive(tmp_path, of_tensor())
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "a") as file:
            file.writestr("m/byteorder", options["byteorder"])
    else:
        archive(tmp_path, options.pop("content", of_tensor()), **options)
    with pytest.raises(UserError, match=message) as error:
        TorchReader(tmp_path)
    assert str(error.value).isprintable()


def test_truncated_files_are_refused_in_one_line(tmp_path):
    path = archive(tmp_path, of_tensor())
    content = path.read_bytes()
    for size in (0, 3, 4, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="not a file of PyTorch weights"):
            TorchReader(tmp_path)
    path.write_bytes(content.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK", b"PK", 1))
    with pytest.raises(UserError, match="not a file of PyTorch weights"):
        TorchReader(tmp_path)


def test_the_directory_of_an_archive_is_bounded(tmp_path, monkeypatch):
    archive(tmp_path, of_tensor())
    TorchReader(tmp_path)
    monkeypatch.setattr("sdjax.io.torch_file.MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(UserError, match=r"a directory of \d+ bytes"):
        TorchReader(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("sdjax.io.torch_file.MAX_PICKLE_BYTES", 10)
    with pytest.raises(UserError, match=r"a pickle of \d+ bytes"):
        TorchReader(tmp_path)


def test_every_prefix_and_every_changed_byte_of_a_pickle_ends_in_its_error():
    content = of_tensor()
    for position in range(len(content)):
        for changed in (content[:position], *(
            content[:position] + bytes([byte]) + content[position + 1 :] for byte in (0, 46, 255)
        )):  # fmt: skip
            with contextlib.suppress(PickleError):  # and no other exception
                assert isinstance(tensors_of(load_pickle(changed)[0]), dict)


def test_names_of_a_model_are_checked(torch, tmp_path):
    config, params = tiny_model()
    write_model(tmp_path / "model", config, params)
    in_torch_files(torch, tmp_path / "model", tmp_path)
    path = tmp_path / "model" / "pytorch_model.bin"
    tensors = torch.load(path)
    name = next(iter(param_specs(config).values())).hf_name
    torch.save({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(UserError, match="missing from the weights"):
        load_model(tmp_path / "model")
