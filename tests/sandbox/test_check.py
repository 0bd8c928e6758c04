"""`sdjax check`: files in, verdicts and an exit status out."""

import json

import pytest
from catalogue import TIES, VALID

from sdjax.errors import UserError
from sdjax.sandbox.check import check_files


@pytest.fixture
def files(tmp_path):
    sources = {"linear.py": VALID["linear"], "copy.py": VALID["linear"], "bad.py": "import os\n"}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    (tmp_path / "latin.py").write_bytes("# caf\u00e9\n".encode("latin-1") + VALID["svd"].encode())
    return [tmp_path / name for name in (*sources, "latin.py")]


def test_json_is_one_object_a_file(files, contract):
    text, status = check_files(files, contract, as_json=True)
    rows = [json.loads(line) for line in text.split("\n")]
    assert status == 1
    assert [row["file"] for row in rows] == [str(f) for f in files]
    assert [r["verdict"] for r in rows] == ["admitted", "duplicate", "refused", "refused"]
    assert rows[0]["rule"] == ""
    assert len(rows[0]["hash"]) == 64
    assert rows[0]["cost"] > 0
    assert rows[1]["duplicate_of"] == str(files[0])
    assert rows[2]["rule"] == "import"
    assert rows[2]["hash"] is None
    assert rows[3]["rule"] == "encoding"


def test_a_table_for_people_and_zero_when_all_are_admitted(tmp_path, contract):
    file = tmp_path / "ties.py"
    file.write_text(TIES)
    text, status = check_files([file], contract, as_json=False)
    assert status == 0
    assert "admitted" in text
    assert "\x1b" not in text


def test_a_missing_file_is_the_users_mistake(tmp_path, contract):
    with pytest.raises(UserError, match=r"none\.py: cannot be read"):
        check_files([tmp_path / "none.py"], contract, as_json=False)
