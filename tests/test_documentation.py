"""README and documentation site: Python blocks that run, links and file names that exist."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.merging.methods.registry import methods
from sdjax.search import config as search_config
from sdjax.search.schema import TABLES
from sdjax.training.config import JOBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
# A path of the checkout in backticks, such as `sdjax/xla/` or `configs/demo.yaml`.
CODE_PATH = re.compile(r"`((?:sdjax|tests|benchmarks|configs|docs|examples|tpu)/[\w./-]+)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"\bsdjax ([\w-]+)(?= )")


def python_blocks(path):
    return re.findall(r"^```python[^\n]*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_readme_python_blocks_run(capsys):
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks[0].strip().splitlines()) <= 15
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert re.search(r"\d", capsys.readouterr().out)


def test_task_example_runs():
    (block,) = python_blocks(ROOT / "docs" / "task.md")
    namespace = {}
    exec(compile(block, "docs/task.md", "exec"), namespace)
    task = namespace["Riddles"]()
    (problem,) = task.problems("test")
    assert task.grade(task.extract_flexible("It is a piano."), problem)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [path for path in CODE_PATH.findall(text) if not (ROOT / path).exists()]
    assert not missing


def test_readme_lists_every_command():
    text = (ROOT / "README.md").read_text()
    assert set(COMMAND.findall(text)) >= set(main.commands) - {"demo", "methods"}
    for command in main.commands:
        assert f"`sdjax {command}" in text
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_config_page_lists_every_section():
    page = (ROOT / "docs" / "config.md").read_text()
    sections = {search_config.RunConfig, search_config.ExpertConfig, *JOBS.values()}
    pending = list(sections)
    while pending:
        for field in dataclasses.fields(pending.pop()):
            section = getattr(search_config, str(field.type), None)
            if dataclasses.is_dataclass(section) and section not in sections:
                sections.add(section)
                pending.append(section)
    for section in sections:
        assert f"::: {section.__module__}.{section.__qualname__}\n" in page


def test_contributing_describes_every_package():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    packages = {path.parent.name for path in (ROOT / "sdjax").glob("*/__init__.py")}
    assert {name for name, _ in rows} | {"testing"} == packages
    for name, files in rows:
        for file in re.findall(r"`([^`]+)`", files):
            assert (ROOT / "sdjax" / name / file).exists(), f"{name}/{file}"


def test_run_folder_page_describes_every_table_and_column():
    page = (ROOT / "docs" / "run-folder.md").read_text()
    pending = list(TABLES)
    for record, table in TABLES.items():
        directive = f"### `{table.name}`\n\n::: {record.__module__}.{record.__qualname__}\n"
        assert directive in page, table.name
    while pending:
        record = pending.pop()
        described = "".join(cls.__doc__ or "" for cls in record.__mro__)
        for name, kind in typing.get_type_hints(record).items():
            assert re.search(rf"^ +{name}: ", described, re.MULTILINE), f"{record.__name__}.{name}"
            if dataclasses.is_dataclass(kind):
                assert f"::: {kind.__module__}.{kind.__qualname__}\n" in page
                pending.append(kind)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


def test_counts_in_the_guide_to_merging():
    page = (ROOT / "docs" / "merging.md").read_text()
    assert f"lists the {len(methods())} methods" in page
    recipes = list((ROOT / "tests/merging/recipe/mergekit/recipes").glob("*.yaml"))
    assert f"\n{len(recipes)} recipes over tiny float32 models" in page
