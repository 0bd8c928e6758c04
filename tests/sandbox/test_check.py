"""`sdjax check`: report and exit status."""

import json
import re

import pytest
from catalogue import TIES, VALID
from click.testing import CliRunner

from sdjax.cli.check import check_files
from sdjax.cli.main import main
from sdjax.cli.open_algorithm import open_algorithm
from sdjax.core.errors import UserError
from sdjax.io.model_paths import ZOO
from sdjax.sandbox.ir.decode import decode
from sdjax.sandbox.ir.pretty_print import pretty_print
from sdjax.sandbox.worker.trace import trace_trusted


@pytest.fixture
def files(tmp_path):
    sources = {"linear.py": VALID["linear"], "copy.py": VALID["linear"], "bad.py": "import os\n"}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    (tmp_path / "latin.py").write_bytes("# caf\u00e9\n".encode("latin-1") + VALID["svd"].encode())
    return [str(tmp_path / name) for name in (*sources, "latin.py")]


def test_json_has_one_object_per_file(files, signature):
    text, status = check_files(files, signature, as_json=True)
    rows = [json.loads(line) for line in text.split("\n")]
    assert status == 1
    assert [row["file"] for row in rows] == [str(f) for f in files]
    assert [r["verdict"] for r in rows] == ["admitted", "duplicate", "refused", "refused"]
    assert rows[0]["rule"] == ""
    assert len(rows[0]["identity"]) == 64
    assert rows[0]["cost"] > 0
    assert rows[1]["duplicate_of"] == str(files[0])
    assert rows[0]["similar_to"] is None
    assert rows[2]["rule"] == "import"
    assert rows[2]["identity"] is None
    assert rows[3]["rule"] == "encoding"


def test_table_and_status_zero_if_all_are_admitted(tmp_path, signature):
    file = tmp_path / "ties.py"
    file.write_text(TIES)
    text, status = check_files([str(file)], signature, as_json=False)
    assert status == 0
    assert "admitted" in text
    assert "\x1b" not in text


def test_table_has_one_line_per_file_and_long_messages_in_full(files, tmp_path, signature):
    long = tmp_path / ("deep" * 20 + ".py")
    long.write_text(f"def merge_models(task_vectors):\n    raise ValueError('{'very ' * 60}')\n")
    text, _ = check_files([str(long), "ties", *files], signature)
    table, message, *_ = text.split("\n\n")
    lines = table.split("\n")
    assert max(map(len, text.split("\n"))) <= 100
    assert [line.split()[1] for line in lines] == [
        *("verdict", "refused", "admitted", "admitted", "duplicate", "refused", "refused")
    ]
    assert lines[1].split()[0].endswith("deepdeep.py")
    assert "…" in lines[1].split()[0]
    assert message.startswith(str(tmp_path)[:40])
    assert message.count("very") == 60


def test_messages_are_not_parsed_as_markup(tmp_path, signature):
    path = tmp_path / "[b]loud.py"
    path.write_text("def merge_models(task_vectors):\n    raise ValueError('[red]no[/bold]')\n")
    text, status = check_files([str(path)], signature, as_json=False)
    assert status == 1
    assert "[red]no[/bold]" in text


def test_missing_file_raises_user_error(tmp_path, signature):
    with pytest.raises(UserError, match=r"none\.py: no such file; "):
        check_files([str(tmp_path / "none.py")], signature, as_json=False)
    with pytest.raises(UserError, match="not a file, but a folder, pipe or device"):
        check_files([str(tmp_path)], signature, as_json=False)


def test_misspelled_method_or_file_is_suggested(tmp_path, signature, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    for name, meant in (("tiess", "ties"), ("mine", "mine.py")):
        message = f"{name}: no such file or merge method; did you mean {meant}?"
        with pytest.raises(UserError, match=re.escape(message)):
            check_files([name], signature)
        with pytest.raises(UserError, match=re.escape(message)):
            open_algorithm(name, signature, parameters={})


def test_shipped_method_of_another_number_of_experts_names_the_option(signature):
    text, status = check_files(["nuslerp", "passthrough", "slerp"], signature)
    assert status == 1
    assert "\nnuslerp takes exactly 2 experts, not 3; use --experts 2" in text
    assert "\npassthrough takes exactly 1 expert, not 3; use --experts 1" in text
    assert "ValueError" not in text
    message = "nuslerp takes exactly 2 experts, not 3; give --expert NAME=MODEL"
    with pytest.raises(UserError, match=message):
        open_algorithm("nuslerp", signature, parameters={})


def test_show_includes_the_array_program(files, signature):
    text, _ = check_files(files[:1], signature, as_json=True, show=True)
    (row,) = map(json.loads, text.split("\n"))
    assert "tensors of (16, 8):\n  v0 = mul(0.3, expert_1)\n" in row["program"]
    assert row["program"].endswith("  return v5")
    table, _ = check_files(files[:3], signature, as_json=False, show=True)
    assert table.count("tensors of (16, 8):") == 2  # includes the duplicate


@pytest.mark.parametrize("name", VALID)
def test_every_program_can_be_pretty_printed(name, signature):
    text = pretty_print(decode(trace_trusted(VALID[name], signature), signature))
    assert "return" in text
    assert "<" not in text.replace("<=", "")  # no repr of a Python object


def test_command(tmp_path):
    """Check the exit status: 0 if all are admitted, 1 if one is not, 2 on a user error."""
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(TIES)
    bad.write_text("import os\n")
    done = CliRunner().invoke(main, ["check", str(good), str(bad), "--json", "--show"])
    assert done.exit_code == 1, done.stderr
    rows = [json.loads(line) for line in done.stdout.strip().split("\n")]
    assert [r["verdict"] for r in rows] == ["admitted", "refused"]
    assert {"file", "verdict", "rule", "message", "identity", "cost"} <= rows[0].keys()
    assert "seccomp" in rows[0]["layers"]
    model = str(ZOO / "seed" / "config.json")
    assert CliRunner().invoke(main, ["check", str(good), "--model", model]).exit_code == 0
    for arguments in (
        ["none.py"],
        [str(good), "--allow-missing", "x"],
        [str(good), "--model", "x"],
    ):
        result = CliRunner().invoke(main, ["check", *arguments])
        assert result.exit_code == 2
        assert result.stderr.startswith("sdjax: ")
        assert result.stderr.count("\n") == 1
