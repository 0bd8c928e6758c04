"""Names of files that no file can have, or that lead nowhere."""

import os
from pathlib import Path

import pytest

from sdjax.core.config_files import find_config
from sdjax.core.errors import UserError
from sdjax.evaluation.data import read_rows
from sdjax.evaluation.results import read_results
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.jsonl import read_jsonl
from sdjax.io.model_paths import locate
from sdjax.programs.program_file import read_program
from sdjax.programs.prompts import find_prompt
from sdjax.training.data import read_rows as read_training_rows

LOADERS = {
    "config": find_config,
    "prompt": find_prompt,
    "program": lambda name: read_program(name, 100),
    "model": locate,
    "task": lambda name: find_task(f"{name}.jsonl").problems("test"),
    "data": lambda name: read_rows("t", Path(name), None, "test", ()),
    "jsonl": lambda name: read_jsonl(name, ()),
    "results": lambda name: read_results(Path(name)),
    "training data": lambda name: read_training_rows(name, "train"),
}
NAMES = ("x" * 300, "~nobody-by-this-name/x", "loop", "a\0b", "pipe", "\ud800")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_name_that_cannot_be_read_is_refused_at_once(loader, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".jsonl"):
        (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
        os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(UserError) as caught:
        LOADERS[loader](name)
    assert "\n" not in str(caught.value)
