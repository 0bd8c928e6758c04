"""Links in folders of models, of runs and of results, and names that lead out of them."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.core.errors import UserError
from sdjax.evaluation.data import read_rows
from sdjax.evaluation.results import ResultsFolder, read_results
from sdjax.io.atomic_write import staged_folder, write_file
from sdjax.io.dataset_folder import check_data_folder
from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.io.hub import load_dataset
from sdjax.io.links import check_own_folder, member
from sdjax.io.lock import lock_folder
from sdjax.io.model_files import tokenizer_files
from sdjax.io.model_paths import model_folder
from sdjax.io.orbax import CheckpointFolder
from sdjax.io.peft import PeftAdapter
from sdjax.io.resumable_writer import ResumableFolder
from sdjax.io.safetensors_reader import SafetensorsReader
from sdjax.io.safetensors_writer import write_safetensors
from sdjax.io.tokenizer import load_full_tokenizer, load_tokenizer
from sdjax.search.store import Store

REFUSED = "by a symbolic link, which is not followed"


@pytest.fixture
def model(tmp_path):
    """Return a copy of the zoo's seed."""
    return shutil.copytree(model_folder("zoo:seed"), tmp_path / "model")


@pytest.fixture
def outside(tmp_path):
    """Return a folder with a file that must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    yield folder
    assert {path.name for path in folder.iterdir()} == {"secret"}
    assert (folder / "secret").read_text() == "secret"


def replace_by_link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def in_cache(model, tmp_path):
    """Move a model's files to blobs of a cache, as huggingface_hub does."""
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    model.rename(cache / "blobs")
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "", "..", "x\0y", "\ud800", "a\x1b[2J"]
)
def test_only_names_in_the_folder_are_members(tmp_path, name):
    with pytest.raises(UserError, match=r"is not the name of a file in this folder; copy") as error:
        member(tmp_path, name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("target", ["../outside/secret", "missing"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", load_model),
        ("model.safetensors", load_model),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer_config.json", load_tokenizer),
        ("generation_config.json", load_tokenizer),
        ("chat_template.jinja", load_full_tokenizer),
        ("vocab.json", load_full_tokenizer),
        ("config.json", load_full_tokenizer),
        ("tokenizer.model", tokenizer_files),
    ],
)
def test_links_in_a_model_are_refused(model, outside, name, read, target):
    replace_by_link(model / name, target)
    with pytest.raises(UserError, match=re.escape(f"{model / name}: leads to ") + f".*{REFUSED}"):
        read(model)


def test_a_link_to_itself_and_a_pipe_are_refused(model):
    replace_by_link(model / "config.json", "config.json")
    with pytest.raises(UserError, match=r"config.json: not found"):
        load_model(model)
    replace_by_link(model / "config.json", "missing")
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(UserError, match=r"config.json: neither a file nor a folder; remove it"):
        load_model(model)


def test_links_to_blobs_of_the_same_cache_are_followed(model, outside, tmp_path):
    _, params = load_model(model)
    snapshot = in_cache(model, tmp_path)
    _, cached = load_model(snapshot)
    np.testing.assert_array_equal(cached["embed"], params["embed"])
    assert "tokenizer.json" in tokenizer_files(snapshot)
    (tmp_path / "alias").symlink_to(snapshot)  # named by the user
    load_model(tmp_path / "alias")
    for target in (outside / "secret", "../../../outside/secret"):
        replace_by_link(snapshot / "tokenizer.json", target)
        with pytest.raises(UserError, match=REFUSED):
            load_tokenizer(snapshot)
    # A blob that is itself a link.
    replace_by_link(snapshot / "tokenizer.json", "../../blobs/tokenizer.json")
    replace_by_link(snapshot.parents[1] / "blobs" / "tokenizer.json", outside / "secret")
    with pytest.raises(UserError, match=REFUSED):
        load_tokenizer(snapshot)


def test_blobs_that_are_a_link_are_refused(model, outside, tmp_path):
    snapshot = in_cache(model, tmp_path)
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=REFUSED):
        load_tokenizer(snapshot)


@pytest.mark.parametrize("file", ["../outside/x.safetensors", "/x.safetensors", "a\x1b"])
def test_names_of_an_index_stay_in_the_folder(tmp_path, outside, file):
    for name in ("config.json", "x.safetensors"):
        (tmp_path / name).write_text("{}")
    index = {"weight_map": {"w": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not the name of a file in this folder"):
        SafetensorsReader(tmp_path)


def test_links_in_an_index_and_in_an_adapter_are_refused(tmp_path, outside):
    write_safetensors(tmp_path / "real.safetensors", {"w": np.zeros(2, np.float32)})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.safetensors").symlink_to(tmp_path / "real.safetensors")
    index = {"weight_map": {"w": "x.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=REFUSED):
        SafetensorsReader(tmp_path / "model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        adapter = tmp_path / f"with a linked {name}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        replace_by_link(adapter / name, tmp_path / "real.safetensors")
        with pytest.raises(UserError, match=REFUSED):
            PeftAdapter(adapter)


def test_a_linked_tokenizer_is_not_copied_into_a_result(model, outside, tmp_path):
    replace_by_link(model / "tokenizer_config.json", outside / "secret")
    config, params = load_model(model)
    with pytest.raises(UserError, match=REFUSED):
        write_model(tmp_path / "out", config, params, assets_from=model)
    assert not (tmp_path / "out").exists()
    recipe = tmp_path / "recipe.yaml"
    text = f"models: [{{model: '{model}', parameters: {{weight: 1}}}}]\nmerge_method: linear\n"
    recipe.write_text(text)
    result = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert REFUSED in result.output
    assert not (tmp_path / "out").exists()


def test_hidden_folders_that_are_links_are_refused(tmp_path, outside):
    (tmp_path / ".out.partial").symlink_to(outside)
    tensors = {"w": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match=REFUSED):
        ResumableFolder(tmp_path / "out", tensors, fingerprint="", max_file_bytes=10)
    with pytest.raises(UserError, match=REFUSED), staged_folder(tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["journal", "lock", "model.safetensors", "a/b"])
def test_links_in_a_hidden_folder_are_refused(tmp_path, outside, name):
    path = tmp_path / ".out.partial" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(outside / "secret")
    tensors = {"w": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match=REFUSED):
        ResumableFolder(tmp_path / "out", tensors, fingerprint="", max_file_bytes=10)


def test_files_replace_links_and_other_names_of_a_file(tmp_path, outside):
    for name in ("link", ".link.partial", ".name.partial"):
        (tmp_path / name).symlink_to(outside / "secret")
    os.link(outside / "secret", tmp_path / ".hard.partial")
    for name in ("link", "name", "hard"):
        write_file(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
        assert not (tmp_path / name).is_symlink()


@pytest.mark.parametrize("place", ["5", "5/metrics", "."])
def test_linked_checkpoints_are_refused(tmp_path, outside, place):
    folder = tmp_path / "generators"
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).symlink_to(outside)
    with pytest.raises(UserError, match=REFUSED):
        CheckpointFolder(folder, item="factors", unit="step", keep_latest=1)


@pytest.mark.parametrize(
    "name", ["run.sqlite", "run.sqlite-shm", "run.lock", "adapters", "generators/1"]
)
@pytest.mark.parametrize("write", [False, True])
def test_links_in_a_run_folder_are_refused(tmp_path, outside, name, write):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(outside / "secret")
    with pytest.raises(UserError, match=REFUSED):
        Store.open(run, write=write)


def test_the_folder_that_the_user_names_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    lock_folder(tmp_path / "alias", "lock").release()
    os.mkfifo(tmp_path / "real" / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        lock_folder(tmp_path / "alias", "lock")
    check_own_folder(tmp_path / "missing")


def test_links_next_to_data_are_refused(tmp_path, outside):
    """A split of --data FOLDER, and the worked examples next to --data FILE."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").symlink_to(outside / "secret")
    with pytest.raises(UserError, match=REFUSED):
        read_rows("questions", data, None, "test", ())
    (data / "x_test.jsonl").write_text("{}")
    (data / "x_train.jsonl").symlink_to(outside / "secret")
    with pytest.raises(UserError, match=REFUSED):
        read_rows("questions", data / "x_test.jsonl", None, "train", ())
    alias = tmp_path / "alias.jsonl"  # named by the user
    alias.symlink_to(data / "x_test.jsonl")
    assert len(read_rows("questions", alias, None, "test", ())) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(("train.jsonl", REFUSED), ("part/train.jsonl", REFUSED)),
        *(("x.zip", "may expand to any size"), ("x.XML", "may name files elsewhere")),
    ],
)
def test_folders_of_data_are_read_without_links_and_archives(tmp_path, outside, name, message):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    if name.startswith("x."):
        path.write_bytes(b"")
    else:
        path.symlink_to(outside / "secret")
    with pytest.raises(UserError, match=message):
        load_dataset(str(tmp_path / "data"), split="train")


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("data_files: ../outside/secret", "data_files may not name '../outside/secret'"),
        ("data_files: [{split: train, path: [/etc/passwd]}]", "may not name '/etc/passwd'"),
        ("data_files: {train: 'http://127.0.0.1:9/x.jsonl'}", "may not name 'http://127.0.0.1:9"),
        ("data_files: 'zip://x.jsonl::x'", "may not name 'zip://x.jsonl::x'"),
        ("data_dir: ~", None),
        ("data_dir: '~root'", "may not name '~root'"),
        ("storage_options: {}", "'storage_options' is not supported in `configs`"),
        ("data_files: &a [*a]", "recursive alias"),
        ("data_files: 1", None),
    ],
)
def test_settings_of_a_dataset_stay_in_its_folder(tmp_path, outside, name, config, message):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"a": 1}')
    text = f"configs:\n- config_name: default\n  {config}\n"
    (data / name).write_text(f"---\n{text}---\n" if name == "README.md" else text)
    if message is None:
        check_data_folder(data)
    else:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            load_dataset(str(data), split="train")
        assert "\n" not in str(error.value)


def test_a_folder_of_a_dataset_keeps_its_configurations(tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train.jsonl").write_text('{"a": "main"}')
    (tmp_path / "train.jsonl").write_text('{"a": "other"}')
    files = "data_files: [{split: train, path: main/train*}]"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  {files}\n---\n# X")
    assert load_dataset(str(tmp_path), "main", split="train")[0] == {"a": "main"}


def test_columns_that_name_files_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": "/etc/passwd"}')
    features = "dataset_info: {features: [{name: a, dtype: image}]}"
    (tmp_path / "README.md").write_text(f"---\n{features}\n---\n")
    with pytest.raises(UserError, match="the column 'a' has files such as images"):
        load_dataset(str(tmp_path), split="train")


@pytest.mark.parametrize("name", ["settings.json", "results.jsonl", "scores.json", "eval.lock"])
def test_links_in_a_folder_of_results_are_refused(tmp_path, outside, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text("{}")
    replace_by_link(out / name, outside / "secret")
    with pytest.raises(UserError, match=REFUSED):
        ResultsFolder(out, {})
    if name == "results.jsonl":
        with pytest.raises(UserError, match=REFUSED):
            read_results(out)
