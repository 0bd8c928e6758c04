"""Readable listing of an array program."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from sdjax.sandbox.ir.calling_convention import CallingConvention
from sdjax.sandbox.ir.decode import Atom, Block


class DecodedPrograms(Protocol):
    """Common interface of `decode.Message` and `VerifiedProgram`."""

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """Default values by name."""

    @property
    def programs(self) -> Mapping[Any, tuple[CallingConvention, Block]]:
        """Array programs by name."""


def pretty_print(message: DecodedPrograms) -> str:
    """List each array program: a line with its tensors, then one line per operation."""
    names = list(message.hyperparameters)
    lines: list[str] = []
    for name, (convention, block) in message.programs.items():
        where = f"program {name}" if isinstance(name, str) else f"tensors of {name[1]}"
        kind = f", {name[0]}" if isinstance(name, tuple) and name[0] else ""
        inputs = _inputs(convention, names)
        lines += [f"{where}{kind}:", *_block(block, inputs, "  ", "return")]
    defaults = ", ".join(f"{k} = {v:g}" for k, v in message.hyperparameters.items())
    return "\n".join([f"# {defaults}"] * bool(defaults) + lines)


def _inputs(convention: CallingConvention, hyperparameters: list[str]) -> list[str]:
    paths = [""] if convention.paths is None else [f"[{path}]" for path in convention.paths]
    tensors = [f"{owner}{path}" for owner in (*convention.slots, "base") for path in paths]
    return [*tensors, "key", "depth", *hyperparameters]


def _block(block: Block, inputs: list[str], indent: str, verb: str) -> list[str]:
    values, lines = list(inputs), []
    for equation in block.equations:
        fresh = [f"v{len(values) + i - len(inputs)}" for i in range(equation.outputs)]
        inner = {k: v for k, v in equation.params.items() if isinstance(v, Block)}
        branches = equation.params.get("branches", ())
        inner |= {f"branch {i}": branch for i, branch in enumerate(branches)}
        options = [
            f"{key}={_option(value)}"
            for key, value in equation.params.items()
            if key not in inner and key != "branches" and value is not None
        ]
        operands = [_atom(a, values) for a in equation.operands]
        call = f"{equation.name}({', '.join([*operands, *options])})"
        lines.append(f"{indent}{', '.join(fresh)} = {call}")
        for key, body in inner.items():
            arguments = [f"x{i}" for i in range(body.inputs)]
            lines.append(f"{indent}  {key} of {', '.join(arguments)}:")
            lines += _block(body, arguments, indent + "    ", "yield")
        values += fresh
    outputs = ", ".join(_atom(a, values) for a in block.outputs)
    return [*lines, f"{indent}{verb} {outputs}"]


def _atom(atom: Atom, values: list[str]) -> str:
    if type(atom) is int:
        return values[atom]
    if isinstance(atom, np.ndarray):
        return f"constant {atom.dtype.name}{list(atom.shape)}"
    return f"{atom:g}" if isinstance(atom, np.floating) else str(atom)


def _option(value: Any) -> str:
    return getattr(value, "name", None) or str(value).replace(" ", "")
