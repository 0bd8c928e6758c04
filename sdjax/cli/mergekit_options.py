"""Options of mergekit-yaml that `sdjax merge` accepts, so that a command need not be rewritten.

Some have the same meaning here. Those that only change how mergekit works give a note; those that
would change the result are refused with what to do instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from sdjax.cli.group import echo
from sdjax.core.errors import UserError

Command = TypeVar("Command", bound=Callable)

_DEVICES = (
    "a merge runs on the accelerators that JAX finds, and on the CPU if there are none or the "
    "environment variable JAX_PLATFORMS is cpu"
)
_STREAMED = "tensors are read, merged and written one at a time on any machine"
# Option to why it has no effect here.
_NO_EFFECT = {
    "--cuda": _DEVICES,
    "--multi-gpu": _DEVICES,
    "--read-to-gpu": _DEVICES,
    "--gpu-rich": _DEVICES,
    "--low-cpu-memory": _STREAMED,
    "--lazy-unpickle": _STREAMED,
    "--async-write": _STREAMED,
    "--verbose": "notes are always printed",
}
# The same for options with a value.
_NO_EFFECT_VALUES = {
    "--device": _DEVICES,
    "--num-threads": "XLA uses all cores; use taskset to limit them",
    "--write-threads": _STREAMED,
    "--lora-merge-cache": "adapters are merged while their model is read, and need no cache",
    "--lora-merge-dtype": "adapters are merged in float32",
}
# Options that say what always happens.
_ALWAYS = ("--clone-tensors", "--copy-tokenizer", "--write-model-card", "--safe-serialization")
# Option to what to do instead.
_REFUSED = {
    "--trust-remote-code": "custom code of models is copied, never run, and merging needs none; "
    "remove the option",
    "--unsafe-truncate-embeddings": "vocabularies of different sizes are matched by token; remove "
    "the option",
    "--no-copy-tokenizer": "delete the tokenizer's files from the result",
    "--no-write-model-card": "delete README.md from the result",
    "--no-safe-serialization": "weights are written as safetensors only; remove the option",
}
_REFUSED_VALUES = {"--transformers-cache": "set the environment variable HF_HOME instead"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


class _Size(click.ParamType):
    """Size of a file, such as 5B or 500M, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,15})([kmbg]?)", value.lower())
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is not a size such as 5B or 500M", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


out_shard_size_option = click.option(
    "--out-shard-size",
    type=_Size(),
    metavar="SIZE",
    help="Maximum size of a safetensors file in bytes, such as 2B or 500M.  [default: 5B]",
)


def mergekit_options(command: Command) -> Command:
    """Add mergekit's options without a meaning here, hidden in the help text, to a command."""
    options = [
        *((name, True) for name in (*_NO_EFFECT, *_ALWAYS, *_REFUSED)),
        *((f"--no-{name[2:]}", True) for name in _NO_EFFECT),
        *((name, False) for name in (*_NO_EFFECT_VALUES, *_REFUSED_VALUES)),
    ]
    for name, is_flag in options:
        spellings = ("-v", name) if name == "--verbose" else (name,)
        option = click.option(
            *spellings,
            name[2:].replace("-", "_"),
            is_flag=is_flag,
            multiple=not is_flag,
            count=False,
            hidden=True,
            expose_value=False,
            callback=_explain,
        )
        command = option(command)
    return command


def _explain(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Print why an option that was given has no effect; raise UserError if it is refused."""
    name = max(param.opts, key=len)
    if not value or name in _ALWAYS or (name.startswith("--no-") and name not in _REFUSED):
        return
    refused: Mapping[str, str] = {**_REFUSED, **_REFUSED_VALUES}
    if name in refused:
        raise UserError(f"{name}: {refused[name]}")
    reason = {**_NO_EFFECT, **_NO_EFFECT_VALUES}[name]
    echo(f"sdjax: {name} has no effect: {reason}", err=True)
