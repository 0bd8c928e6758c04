"""Model folders: reading, writing, and error messages for damaged ones."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import ModelReader, load_model, write_model
from sdjax.io.safetensors_reader import SafetensorsReader
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.sharding.mesh import make_mesh
from sdjax.testing import random_params, tiny_config


def tiny(**changes):
    return tiny_config(**{"eos_token_ids": (1, 2), **changes})


@pytest.fixture
def folder(tmp_path):
    config = tiny()
    write_model(tmp_path / "model", config, random_params(config, dtype=jnp.bfloat16))
    return tmp_path / "model"


def rewrite(folder, change):
    """Apply `change` to the dict of stored weights and save them again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_round_trip_is_byte_identical(tmp_path, tied, dtype):
    config = tiny(tie_embeddings=tied)
    params = random_params(config, dtype=dtype)
    write_model(tmp_path / "a", config, params)
    found, read = load_model(tmp_path / "a")
    assert found == config
    assert flatten(read).keys() == param_specs(config).keys()
    for path, leaf in flatten(read).items():
        assert leaf.dtype == dtype
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(params)[path]).tobytes(), path
    write_model(tmp_path / "b", found, read)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_written_bytes_equal_those_of_reference_writer(tmp_path, folder):
    stored = (folder / "model.safetensors").read_bytes()
    save_file(load_file(folder / "model.safetensors"), tmp_path / "reference")
    reference = (tmp_path / "reference").read_bytes()
    size = sum(leaf.nbytes for leaf in flatten(load_model(folder)[1]).values())
    assert stored[-size:] == reference[-size:]


def test_mixed_dtypes_are_preserved(tmp_path):
    config = tiny()
    params = random_params(config, dtype=jnp.bfloat16)
    params["final_norm"] = params["final_norm"].astype(jnp.float32)
    write_model(tmp_path / "m", config, params)
    _, read = load_model(tmp_path / "m")
    assert read["final_norm"].dtype == jnp.float32
    assert read["embed"].dtype == jnp.bfloat16
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"


def test_several_files_and_cast(tmp_path):
    config = tiny()
    params = random_params(config, dtype=jnp.bfloat16)
    write_model(tmp_path / "m", config, params, max_file_bytes=3000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    _, read = load_model(tmp_path / "m", dtype=jnp.float32)
    for path, leaf in flatten(read).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, flatten(params)[path].astype(jnp.float32))


def test_load_selected_paths(folder):
    paths = {"layers/0/mlp/up_proj", "layers/1/mlp/down_proj"}
    _, read = load_model(folder, paths=paths)
    assert flatten(read).keys() == paths
    with pytest.raises(UserError, match="no tensor 'layers/7/mlp/up_proj'"):
        load_model(folder, paths=["layers/7/mlp/up_proj"])


def test_load_onto_mesh(folder):
    mesh = make_mesh({"tensor": 1})
    _, plain = load_model(folder)
    _, read = load_model(folder, mesh=mesh)
    for path, leaf in flatten(read).items():
        assert leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(plain)[path]))


def test_assets_are_copied(tmp_path, folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"a": 1}')
    (folder / "README.md").write_text("not copied")
    config, params = load_model(folder)
    write_model(tmp_path / "copy", config, params, assets_from=folder)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert names == expected


def test_write_to_non_empty_folder_raises_user_error(folder):
    config, params = load_model(folder)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        write_model(folder, config, unflatten({}))
    with pytest.raises(UserError, match="exists and is not empty"):
        write_model(folder, config, params)
    assert (folder / "model.safetensors").read_bytes() == before


def test_failed_write_leaves_no_files(tmp_path, folder):
    config, params = load_model(folder)

    class Broken:
        shape, dtype, nbytes, size = (16,), np.dtype(np.float32), 64, 16

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_model(tmp_path / "new", config, {**params, "final_norm": Broken()})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_write_to_empty_folder(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty", *load_model(folder))
    assert load_model(tmp_path / "empty")[0] == load_model(folder)[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda p: p.pop("embed"), "missing parameters: 'embed'"),
        (lambda p: p.update(extra=p["embed"]), "unexpected parameters: 'extra'"),
        (lambda p: p.update(embed=p["embed"][:3]), r"embed has shape \[3, 16\], not \[64, 16\]"),
        (lambda p: p.update(embed=p["embed"].astype(jnp.int32)), "embed is int32"),
        (lambda p: p.update(embed=p["embed"] * jnp.nan), "embed_tokens.weight contains NaN or inf"),
    ],
)
def test_write_with_invalid_params_raises_user_error(tmp_path, params, message):
    config = tiny()
    tree = random_params(config, dtype=jnp.bfloat16)
    params(tree)
    with pytest.raises(UserError, match=message):
        write_model(tmp_path / "m", config, tree)
    assert not (tmp_path / "m").exists()


def test_a_stored_output_matrix_of_a_tied_model_is_not_used(tmp_path, caplog):
    config = tiny(tie_embeddings=True)
    write_model(tmp_path / "m", config, random_params(config, dtype=jnp.bfloat16))

    def store_identical(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(tmp_path / "m", store_identical)
    caplog.set_level("INFO", logger="sdjax")
    assert "lm_head" not in load_model(tmp_path / "m")[1]
    assert caplog.messages == []

    def store_different(tensors):
        tensors["lm_head.weight"][-1, -1] += 1

    rewrite(tmp_path / "m", store_different)
    assert "lm_head" not in load_model(tmp_path / "m")[1]
    (note,) = caplog.messages
    assert "lm_head.weight differs from model.embed_tokens.weight" in note


def test_old_rotary_buffers_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    assert flatten(load_model(folder)[1]).keys() == param_specs(tiny()).keys()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_non_finite_weights_raise_user_error(tmp_path, dtype, number):
    config = tiny()
    params = random_params(config, dtype=dtype)
    largest = jnp.asarray(jnp.finfo(dtype).max, dtype)
    params["layers"]["1"]["mlp"]["up_proj"] = jnp.full((24, 16), largest, dtype)
    write_model(tmp_path / "m", config, params)
    load_model(tmp_path / "m")
    name = "model.layers.1.mlp.down_proj.weight"
    broken = np.asarray(jnp.ones((16, 24), dtype).at[15, 23].set(number))
    rewrite(tmp_path / "m", lambda tensors: tensors.update({name: broken}))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight' contains NaN or inf"):
        load_model(tmp_path / "m")
    # Tensors that are not read are not checked.
    load_model(tmp_path / "m", paths=["layers/1/mlp/up_proj"])
    params["layers"]["1"]["mlp"]["down_proj"] = jnp.asarray(broken)
    with pytest.raises(UserError, match=r"down_proj\.weight contains NaN or infinity"):
        write_model(tmp_path / "again", config, params)


def test_reading_in_blocks_is_equivalent(folder, monkeypatch):
    """Read blocks of a few rows."""
    plain = SafetensorsReader(folder)
    monkeypatch.setattr("sdjax.io.stored_reader.MAX_BLOCK_BYTES", 100)
    small = SafetensorsReader(folder)
    for name in plain.names:
        whole = plain.read(name)
        boxes = [(slice(None),) * whole.ndim, (slice(1, 15), slice(3, 8))[: whole.ndim]]
        for box in boxes:
            np.testing.assert_array_equal(small.read_box(name, box), whole[box])


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda f: shutil.rmtree(f), ["no such model folder"]),
        (lambda f: (f / "config.json").unlink(), ["config.json: not found"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json: not valid JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json: not valid JSON"]),
        (lambda f: edit_config(f, model_type="bert"), ["'bert' is not supported"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ["pytorch_model.bin: truncated or not a file of PyTorch weights", "copy the file"],
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            ["model.safetensors: truncated", "copy the file again"],
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors: truncated"]),
        (lambda f: rewrite(f, lambda t: t.pop(DOWN)), [repr(DOWN), "missing from the weights: "]),
        (
            lambda f: rewrite(f, lambda t: t.update(odd=np.ones(3, np.float32))),
            ["tensors that the model in config.json does not have: 'odd'"],
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({DOWN: t[DOWN].T.copy()})),
            [repr(DOWN), "has shape [24, 16], but config.json requires [16, 24]"],
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({DOWN: np.ones((16, 24), np.int8)})),
            [repr(DOWN), "stored as I8", "bfloat16"],
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            ["not an index of weights"],
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"model.norm.weight": "gone.safetensors"}}'
            ),
            ["gone.safetensors: listed in model.safetensors.index.json but missing"],
        ),
    ],
)
def test_damaged_folder_raises_user_error(folder, damage, messages):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    for message in messages:
        assert message in text


def test_index_that_contradicts_files_raises_user_error(tmp_path):
    config = tiny()
    params = random_params(config, dtype=jnp.bfloat16)
    write_model(tmp_path / "m", config, params, max_file_bytes=3000)
    index = tmp_path / "m/model.safetensors.index.json"
    fields = json.loads(index.read_text())
    files = sorted(set(fields["weight_map"].values()))
    name = next(name for name, file in fields["weight_map"].items() if file == files[0])
    fields["weight_map"][name] = files[1]
    index.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"{files[0]}.*does not list"):
        ModelReader(tmp_path / "m")
