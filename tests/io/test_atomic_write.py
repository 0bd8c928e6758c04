import pytest

from sdjax.core.errors import UserError
from sdjax.io.atomic_write import partial_path, staged_folder, write_file


@pytest.mark.parametrize("content", ["text é\n", b"bytes", [b"by", memoryview(b"tes")]])
def test_write_file_replaces_the_content(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    write_file(path, content)
    expected = "text é\n".encode() if isinstance(content, str) else b"bytes"
    assert path.read_bytes() == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_failed_write_keeps_the_old_file(tmp_path):
    def pieces():
        yield b"new"
        raise RuntimeError("interrupted")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="interrupted"):
        write_file(path, pieces())
    assert path.read_text() == "old"


def test_staged_folder_appears_when_complete(tmp_path):
    folder = tmp_path / "new" / "folder"
    partial_path(folder).mkdir(parents=True)
    (partial_path(folder) / "stale").write_text("of a killed process")
    with staged_folder(folder) as staged:
        write_file(staged / "file", "content")
        assert not folder.exists()
    assert [entry.name for entry in folder.iterdir()] == ["file"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["folder"]
    with pytest.raises(UserError, match="exists and is not empty"), staged_folder(folder):
        pass


def test_failed_staged_folder_leaves_no_files(tmp_path):
    def write():
        with staged_folder(tmp_path / "folder") as staged:
            write_file(staged / "file", "content")
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        write()
    assert list(tmp_path.iterdir()) == []
