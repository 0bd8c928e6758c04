import sys

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.registry import TASKS, find_task

MODULE = """
from dataclasses import dataclass
from sdjax.evaluation.task import Task

class Unfinished(Task):
    name = "unfinished"

class NoTask:
    pass

@dataclass(frozen=True, kw_only=True)
class Two(Task):
    name: str = "two"
    test: int = 5
    def problems(self, split): return []
    def prompt(self, problem): return "?"
    def extract_strict(self, text): return text
    def extract_flexible(self, text): return text
    def grade(self, extracted, problem): return False

@dataclass(frozen=True, kw_only=True)
class Negative(Two):
    def __post_init__(self): raise ValueError("test")

class Listed(Two):
    stop = ["Q"]

class Nameless(Two):
    name = None
    def __init__(self): pass

class Endless(Two):
    max_new_tokens = 0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "registry_test_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "registry_test_module"


@pytest.mark.parametrize("name", TASKS)
def test_task_is_found_by_name(name):
    assert find_task(name).name == name


def test_class_receives_the_settings_it_accepts(module):
    assert find_task(f"{module}:Two", trust_code=True).test == 5
    settings = {"test": 3, "shots": 0, "allow_missing": ("landlock",), "trust_code": True}
    assert find_task(f"{module}:Two", **settings).test == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nothing", {}, "use one of arithmetic, gsm8k, math, svamp, an existing .jsonl file"),
        ("nothing:Class", {}, "nothing:Class: cannot be imported .ModuleNotFoundError"),
        ("{module}:Nothing", {}, "Nothing: cannot be imported .AttributeError"),
        ("{module}:NoTask", {}, "not a subclass of sdjax.evaluation.task.Task"),
        (
            "{module}:Unfinished",
            {},
            "does not define extract_flexible, extract_strict, grade, problems",
        ),
        ("{module}:Two", {"shots": 3}, "Two: unknown setting shots"),
        ("{module}:Negative", {}, "Negative: cannot be created .ValueError: test."),
        ("{module}:Nameless", {}, "Nameless: name must be a string, not None"),
        ("{module}:Listed", {}, r"Listed: stop must be a tuple of strings, not \['Q'\]"),
        ("{module}:Endless", {}, "Endless: max_new_tokens must be 1 or more, not 0"),
        ("arithmetic", {"data": "x.jsonl"}, "arithmetic: unknown setting data"),
        ("x.jsonl", {"data": "y.jsonl"}, "x.jsonl: already a file of problems"),
    ],
)
def test_invalid_tasks_raise_user_error(module, name, settings, message):
    with pytest.raises(UserError, match=message):
        find_task(name.format(module=module), trust_code=True, **settings)


@pytest.fixture
def dangerous(tmp_path, monkeypatch):
    """Change to a folder with a module that leaves a trace; return the trace's path."""
    (tmp_path / "dangerous.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{MODULE}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("dangerous", None)


def test_a_class_is_not_imported_without_the_users_word(dangerous, monkeypatch):
    monkeypatch.syspath_prepend(dangerous.parent)
    monkeypatch.setenv("PYTHONPATH", ".")
    with pytest.raises(UserError, match=r"dangerous:Two: a class.* pass --trust-code"):
        find_task("dangerous:Two")
    assert not dangerous.exists()
    assert find_task("dangerous:Two", trust_code=True).test == 5


@pytest.mark.parametrize("entry", ["", ".", None])
@pytest.mark.parametrize("named", ["", ":/nowhere"])
def test_the_working_directory_is_not_searched_by_accident(dangerous, monkeypatch, entry, named):
    path = [dangerous.parent if entry is None else entry, *sys.path]
    monkeypatch.setattr(sys, "path", list(map(str, path)))
    monkeypatch.setenv("PYTHONPATH", named)
    with pytest.raises(UserError, match="name its folder in PYTHONPATH"):
        find_task("dangerous:Two", trust_code=True)
    assert not dangerous.exists()
    assert sys.path == list(map(str, path))


def test_file_is_a_task_of_numbers_or_texts(tmp_path):
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text(
        '{"question": "1+1?", "answer": "so #### 2"}\n\n{"question": "?", "answer": 3.0}'
    )
    task = find_task(str(numbers), development=1)
    first, second = (*task.problems("development"), *task.problems("test"))
    assert first == Problem(id="test-0", kind="all", question="1+1?", answer="so #### 2")
    assert second.answer == "3"
    assert [task.grade(task.extract_flexible(text), first) for text in ("it is 2.0.", "3")] == [
        1,
        0,
    ]

    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        '{"question": "Capital?", "answer": "Paris"}\n{"question": "?", "answer": "B"}'
    )
    task = find_task(str(texts), development=0)
    paris, _ = task.problems("test")
    for output, strict, flexible in (
        ("paris", True, True),
        ("The answer is Paris.", False, True),
        ("I think.\nParis!", False, True),
        ("#### Paris", True, False),
        ("Rome", False, False),
    ):
        assert task.grade(task.extract_strict(output), paris) == strict, output
        assert task.grade(task.extract_flexible(output), paris) == flexible, output
