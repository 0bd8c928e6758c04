"""Text of others in the output of commands."""

import ast
import errno
import logging
import os
import unicodedata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import sdjax.cli
from sdjax.cli.group import Group, echo, exit_status
from sdjax.core.errors import UserError
from sdjax.core.logging import configure_logging
from sdjax.core.visible import escape

# Clear the screen, set the title, overwrite the line, reverse the direction; C1; a lone surrogate.
HOSTILE = "\x1b[2J\x1b]0;title\x07\rsafe\u202eevil\x9b31m\x7f\ud800"
SHOWN = (
    "\\u{001b}[2J\\u{001b}]0;title\\u{0007}\\u{000d}safe\\u{202e}evil\\u{009b}31m\\u{007f}\\u{d800}"
)


@click.group(cls=Group)
def main():
    pass


@main.command()
def fail():
    raise UserError(f"{HOSTILE}: not found")


@main.command()
def crash():
    raise RuntimeError(HOSTILE)


@main.command()
def succeed():
    echo(f"{HOSTILE}\tnaïve 日本語\nsecond line")
    echo(HOSTILE, err=True)
    configure_logging()
    logging.getLogger("sdjax.test").warning("%s: truncated", HOSTILE)


def test_escaped_text_has_no_control_characters_but_tabs_and_newlines():
    everything = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100), 0xFEFF, 0xE000]))
    hidden = {c for c in escape(everything) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co")}
    assert hidden == set("\t\n")
    assert escape(HOSTILE) == SHOWN
    assert escape("x" * 30_000) == "x" * 30_000


@pytest.mark.parametrize(("command", "status"), [("fail", 2), ("crash", 1), ("succeed", 0)])
def test_hostile_text_is_escaped_on_every_way_to_the_terminal(command, status):
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == status
    one_line = SHOWN.replace("\\u{000d}", " ")  # as all line breaks of a user error
    assert (one_line if command == "fail" else SHOWN) in result.output
    assert not set(result.output) & set("\x1b\x07\r\u202e\x9b\x7f")
    if command == "fail":
        assert result.output == f"sdjax: {one_line}: not found\n"
    if command == "succeed":
        assert result.stdout == f"{SHOWN}\tnaïve 日本語\nsecond line\n"
        assert result.stderr == f"{SHOWN}\nsdjax: {SHOWN}: truncated\n"


def test_commands_print_through_echo_alone():
    """`json.dumps` escapes by itself; the watchdog prints constants and an escaped command."""
    calls = set()
    for path in Path(sdjax.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "print"):
                calls.add((path.name, ast.unparse(node.args[0])))
    assert calls == {
        ("generate.py", "json.dumps(_fields(sample, checked=checked))"),
        ("group.py", "escape(text)"),
        ("group.py", "start + escape(message)"),
        ("watchdog.py", "f'sdjax: the run {how} in a program; it resumes without it'"),
        ("watchdog.py", "f'sdjax: the run {how} in a program; {remedy}'"),
    }


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_fault_of_the_disk_is_a_user_error_wherever_it_occurs(number):
    status, message = exit_status(OSError(number, os.strerror(number), "results.jsonl"))
    assert status == 2
    assert message.startswith("sdjax: results.jsonl: ")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EEXIST, errno.ENOTDIR])
def test_missing_file_that_no_code_expects_is_an_internal_error(number):
    status, message = exit_status(OSError(number, os.strerror(number), "internal"))
    assert status == 1
    assert "OSError" in message or "Error: [Errno" in message
