"""Folders of programs."""

import os

import pytest

from sdjax.core.errors import UserError
from sdjax.generators import program_folder
from sdjax.generators.program_folder import ProgramFolder, read_programs
from sdjax.generators.types import GeneratedText, GenerationRequest

PROGRAM = "SCALE = 0.5\n\ndef merge_models(task_vectors):\n    return SCALE\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.py").write_text(PROGRAM)
    (tmp_path / "a.py").write_text("")
    (tmp_path / "notes.txt").write_text("not a program")
    (tmp_path / ".hidden.py").write_text("not a program either")
    (tmp_path / "more").mkdir()
    return tmp_path


def test_each_file_is_a_program_in_the_order_of_the_names(folder):
    assert read_programs(folder) == ("", PROGRAM)
    found = {}
    requests = [GenerationRequest(number=number, prompt="p") for number in (4, 2, 9)]
    source = ProgramFolder(programs=read_programs(folder))
    source.sample(requests, on_text=found.__setitem__)
    assert found == {
        4: GeneratedText(text="", source=None, stopped=True),
        2: GeneratedText(text=PROGRAM, source=PROGRAM, stopped=True),  # with its constants
    }


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt"])
def test_folder_without_programs_is_refused(folder, name):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="give a folder with programs"):
        read_programs(folder / name)


def test_hostile_files_are_refused(folder, tmp_path_factory, monkeypatch):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.py"
    secret.write_text("password")
    (folder / "link.py").symlink_to(secret)
    with pytest.raises(UserError, match="symbolic link"):
        read_programs(folder)
    (folder / "link.py").unlink()
    os.mkfifo(folder / "pipe.py")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read_programs(folder)
    (folder / "pipe.py").unlink()
    (folder / "z.py").mkdir()
    with pytest.raises(UserError, match="a folder, not a program"):
        read_programs(folder)
    (folder / "z.py").rmdir()
    (folder / "z.py").write_bytes(b"# \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_programs(folder)
    (folder / "z.py").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UserError, match="larger than 1,048,576 bytes"):
        read_programs(folder)
    monkeypatch.setattr(program_folder, "MAX_FILES", 2)
    with pytest.raises(UserError, match="more than 2 programs"):
        read_programs(folder)
