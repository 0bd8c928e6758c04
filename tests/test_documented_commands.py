"""Commands in the documentation: their options, configs and files are valid.

`test_readme_walkthrough.py` also runs those of the README and the quick start.
"""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from sdjax.cli.main import main
from sdjax.core.config import read_dataclass
from sdjax.core.config_files import CONFIG_FOLDER, find_config, shipped_configs
from sdjax.search.config import read_config
from sdjax.training.config import JOBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tpu/README.md")),
    *(ROOT / "sdjax").rglob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted(CONFIG_FOLDER.glob("*.yaml")),
    *sorted((ROOT / "benchmarks").rglob("*.yaml")),
]
# A line of a code block, or of a config's comment, that runs something.
LINE = re.compile(
    r"^(?:    |#   |)((?:[A-Z_]+=\S+ )*(?:sdjax|python|make|pip|tpu/run\.sh|\.venv/bin/python) .+)$"
)
# Code within a sentence or a table, such as `sdjax run --resume DIR`.
INLINE = re.compile(r"`((?:sdjax|python|make) [^`]+)`")


def lines_of(page):
    """Return the command lines in the code blocks of a page, as lists of words."""
    text = re.sub(r"^```python.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r" *\\\n\s*", " ", text)  # continued lines
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = "\n".join(line for line in text.splitlines() if line.startswith(("    ", "#   ")))
    found = [LINE.match(line) for line in f"{fenced}\n{indented}".splitlines()]
    return [words(match[1]) for match in found if match]


def words(command):
    """Return the words of a command without variables, comment, pipe and redirection."""
    command = re.split(r" [|>] | && ", command)[0]
    parts = shlex.split(command, comments=True)
    return [part for part in parts if not re.fullmatch(r"[A-Z_]+=\S+", part)]


def subcommand(arguments):
    """Return (command, arguments) of the innermost command of an `sdjax` command line."""
    command = main
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        _, command, arguments = command.resolve_command(click.Context(command), arguments)
    return command, arguments


def options_of(command):
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


def check_sdjax(arguments):
    command, rest = subcommand(arguments)
    if not arguments or "--help" in rest:
        return
    values = command.make_context(command.name, list(rest)).params
    config = values.get("config")
    if config is None or not re.search(r"[a-z]", config):  # CONFIG means any
        return
    path, overrides = ROOT / config, values["overrides"]
    if command.name == "train":
        job = values["kind"]
        file = path if path.is_file() else find_config(config, job)
        read_dataclass(JOBS[job], file, overrides)
    else:
        read_config(path if path.is_file() else config, overrides)


def check_python(arguments):
    """Check that a script, module or test exists, and that it has the options."""
    if arguments[:2] == ["-m", "pip"]:
        check_pip(arguments[2:])
        return
    if arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / name).exists() for name in arguments[2:] if "/" in name)
        return
    module = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
    if not (ROOT / module).exists():
        module = module.removesuffix(".py") + "/__main__.py"
    source = (ROOT / module).read_text()
    for option in arguments[1:]:
        if option.startswith("--") and option != "--help":
            assert f'"{option}"' in source, f"{module} has no option {option}"


def check_make(arguments):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {name for name in arguments if "=" not in name} <= set(targets)


def check_pip(arguments):
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for argument in arguments:
        if match := re.fullmatch(r"\.\[(.*)\]", argument):
            assert set(match[1].split(",")) <= set(extras)


def check(command):
    program, arguments = Path(command[0]).name, command[1:]
    if program == "sdjax":
        check_sdjax(arguments)
    elif program == "python":
        check_python(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    else:
        assert (ROOT / command[0]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_valid(page):
    for command in lines_of(page):
        try:
            check(command)
        except click.ClickException as error:
            pytest.fail(f"{shlex.join(command)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist_and_have_the_options(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in INLINE.findall(text):
        command = re.split(r" \\?\| ", code)[0]  # without a pipe, which a table escapes
        program, *arguments = shlex.split(command.replace("\\|", "|"))
        if program == "python":
            check_python(arguments)
        elif program == "make":
            check_make(arguments[:1])
        elif not arguments[0].startswith("-"):
            command, rest = subcommand([part.split("|")[0] for part in arguments])
            options = {part.split("=")[0] for part in rest if re.match(r"--?\w", part)}
            assert options <= options_of(command), code


def test_pages_have_commands():
    """Check that the patterns above find commands at all."""
    found = {page.name: len(lines_of(page)) for page in PAGES if page.parent == ROOT / "docs"}
    assert found["quickstart.md"] >= 4
    assert found["evaluation.md"] >= 3
    assert len(lines_of(ROOT / "README.md")) >= 4


@pytest.mark.parametrize("command", sorted(main.commands))
def test_examples_in_the_help_are_valid(command):
    commands = [main.commands[command]]
    commands += getattr(commands[0], "commands", {}).values()
    for item in commands:
        text = re.sub(r" *\\\n\s*", " ", item.epilog.replace("\b", ""))
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("sdjax ")]
        assert lines
        for line in lines:
            check(words(line))


def test_every_shipped_config_names_its_command():
    shipped = {"run": shipped_configs()} | {f"train {kind}": shipped_configs(kind) for kind in JOBS}
    for command, files in shipped.items():
        for name, file in files.items():
            assert f"sdjax {command} {name}" in file.read_text(), file.name


def test_readme_table_lists_valid_commands():
    """Check the README's table: each usage is complete, and the options that it names exist."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `sdjax (.+)` \| (.*) \|$", text, re.MULTILINE)
    rows = [(usage, sentence) for cell, sentence in rows for usage in cell.split("`, `sdjax ")]
    assert {usage.split()[0] for usage, _ in rows} == set(main.commands)
    for usage, sentence in rows:
        words = [part.split("\\|") for part in usage.split()]
        for alternative in range(max(map(len, words))):
            arguments = [part[min(alternative, len(part) - 1)] for part in words]
            check_sdjax(arguments)
            options = set(re.findall(r"(?<!\w)(--[\w-]+)", sentence))
            assert options <= options_of(subcommand(arguments)[0]), usage


def test_make_targets_of_the_readme_do_what_it_says():
    """Check the two commands of the README without running them."""
    for target, expected in (("demo", "bin/sdjax demo"), ("test", "-m pytest"), ("docs", "mkdocs")):
        assert f"make {target}" in (ROOT / "README.md").read_text()
        shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert expected in shown.stdout


def test_percentages_are_those_of_the_benchmarks():
    """Check that each percentage of the README and the guides is a measured one."""
    measured = (ROOT / "benchmarks" / "README.md").read_text()
    for name in ("README.md", "docs/quickstart.md", "docs/training.md", "docs/index.md"):
        for figure in re.findall(r"\b\d+\.\d %", (ROOT / name).read_text()):
            assert figure in measured, f"{name}: {figure}"
        for interval in re.findall(r"\[\d+\.\d, \d+\.\d\]", (ROOT / name).read_text()):
            assert interval in measured, f"{name}: {interval}"


def test_readme_states_the_supported_versions():
    """Check the README's versions against pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    python, oldest, newest = re.search(
        r"Python (\S+) or newer, JAX (\S+) to 0\.(\d+):", (ROOT / "README.md").read_text()
    ).groups()
    assert f'requires-python = ">={python}"' in project
    assert f'"jax>={oldest},<0.{int(newest) + 1}"' in project
