import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from sdjax.core.errors import UserError
from sdjax.io import resumable_writer
from sdjax.io.resumable_writer import ResumableFolder


def tensors():
    rng = np.random.default_rng(0)
    out = {f"t{i}": rng.standard_normal((3, 5)).astype(np.float32) for i in range(5)}
    out["half"] = rng.standard_normal(7).astype(ml_dtypes.bfloat16)
    out["scalar"] = np.float32(2.0).reshape(())
    return out


def open_writer(out, fingerprint="a", max_file_bytes=130):
    return ResumableFolder(out, tensors(), fingerprint=fingerprint, max_file_bytes=max_file_bytes)


def complete(writer):
    for name, array in tensors().items():
        if name not in writer.done:
            writer.write(name, array)
    writer.finish()


def read(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            out.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return out


@pytest.mark.parametrize("max_file_bytes", [10, 130, 10_000])
def test_folder_appears_when_complete(tmp_path, max_file_bytes):
    writer = open_writer(tmp_path / "out", max_file_bytes=max_file_bytes)
    assert not (tmp_path / "out").exists()
    complete(writer)
    got = read(tmp_path / "out")
    assert got.keys() == tensors().keys()
    assert all(
        np.array_equal(got[name], x) and got[name].dtype == x.dtype for name, x in tensors().items()
    )
    names = [p.name for p in (tmp_path / "out").iterdir()]
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (max_file_bytes < 10_000)
    if index.exists():
        listed = json.loads(index.read_text())
        assert set(listed["weight_map"].values()) == {n for n in names if n.endswith("tensors")}
        assert listed["metadata"]["total_size"] == sum(x.nbytes for x in tensors().values())
    assert not list(tmp_path.glob(".*"))


def test_interrupted_write_is_resumed(tmp_path, monkeypatch):
    writer = open_writer(tmp_path / "out")
    for name in ("t0", "t1", "t2"):
        writer.write(name, tensors()[name])
    writer.close()
    resumed = open_writer(tmp_path / "out")
    assert resumed.done == {"t0", "t1", "t2"}
    resumed.write("t3", tensors()["t3"])
    resumed.close()
    # After a restart of the machine, only files flushed to disk count: two tensors per file.
    monkeypatch.setattr(resumable_writer, "_boot_id", lambda: "another")
    restarted = open_writer(tmp_path / "out")
    assert restarted.done == {"t0", "t1", "t2", "t3"}
    restarted.write("t4", tensors()["t4"])
    restarted.close()
    monkeypatch.setattr(resumable_writer, "_boot_id", lambda: "a third")
    restarted = open_writer(tmp_path / "out")
    assert restarted.done == {"t0", "t1", "t2", "t3"}
    complete(restarted)
    got = read(tmp_path / "out")
    assert all(np.array_equal(got[name], x) for name, x in tensors().items())


@pytest.mark.parametrize("changes", [{"fingerprint": "b"}, {"max_file_bytes": 70}])
def test_different_content_is_not_resumed(tmp_path, changes):
    writer = open_writer(tmp_path / "out")
    writer.write("t0", tensors()["t0"])
    writer.close()
    restarted = open_writer(tmp_path / "out", **changes)
    assert restarted.done == set()
    complete(restarted)


def test_truncated_journal_is_read_up_to_last_complete_line(tmp_path):
    writer = open_writer(tmp_path / "out")
    writer.write("t0", tensors()["t0"])
    writer.write("t1", tensors()["t1"])
    writer.close()
    journal = tmp_path / ".out.partial" / "journal"
    journal.write_text(journal.read_text()[:-20])
    resumed = open_writer(tmp_path / "out")
    assert "t0" in resumed.done
    complete(resumed)


def test_concurrent_writer_raises_user_error(tmp_path):
    writer = open_writer(tmp_path / "out")
    with pytest.raises(UserError, match="being written by another process"):
        open_writer(tmp_path / "out")
    writer.discard()
    writer.close()
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        open_writer(tmp_path / "out")


def test_unusable_folder_raises_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, message in {
        ".": "is the working directory",
        "/proc/none": "none: no such file or folder; check the path",
        "../file/out": "is a file",
        "../file": "is a file",
        "../loop": "is a file",
        300 * "a": "the name is too long; choose a shorter one",
        250 * "a": "the name is too long; choose a shorter one",
    }.items():
        with pytest.raises(UserError, match=message):
            open_writer(Path(out))
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(UserError, match="is a mount point"):
        open_writer(tmp_path / "mounted")


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    complete(open_writer(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "target").keys() == tensors().keys()
