"""Algorithms named on the command line: shipped methods, and program files, which are judged."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdjax.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sdjax.merging.algorithm import Algorithm
    from sdjax.sandbox.merge_trial import MergeTrial
    from sdjax.sandbox.signature import MergeSignature

param_option = click.option(
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="With --algorithm: a hyperparameter, such as density=0.3; weight=0.3,0.5 gives one value "
    "per expert. Repeatable.",
)


def parse_parameters(texts: Iterable[str]) -> dict[str, Any]:
    """Return the hyperparameters in NAME=VALUE texts; "0.3,0.5" is a list of values.

    Raises:
        UserError: not of this form, a value that is not YAML, or a name that occurs twice.
    """
    from sdjax.core.yaml import YamlDocument

    parameters: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        document = YamlDocument(f"[{value}]", f"--param {text}", show_lines=False)
        assert document.root is not None
        values = document.value(document.root)
        if not name or not isinstance(values, list) or not values or None in values:
            raise UserError(f"--param {text}: write NAME=VALUE, such as density=0.3")
        if name in parameters:
            raise UserError(f"--param {text}: {name} is already set; name it once")
        parameters[name] = values if len(values) > 1 else values[0]
    return parameters


def open_algorithm(
    name: str,
    signature: MergeSignature,
    *,
    parameters: Mapping[str, Any],
    allow_missing: Collection[str] = (),
    trial: MergeTrial | None = None,
) -> tuple[Algorithm, str]:
    """Return an algorithm with hyperparameters, and its source text.

    Args:
        name: a Python file that defines `merge_models` or `merge_trees`, or a shipped method, if
            there is no file of that name.
        signature: expert slots, tensors and limits that a file is judged against.
        parameters: values of hyperparameters by name.
        allow_missing: layers of confinement that this machine may lack.
        trial: what the merge will compile, if a file's program is tried first.

    Raises:
        UserError: no such file or method, a refused program (the message says why), an unknown
            hyperparameter or one of another type, or a missing layer of confinement.
    """
    from sdjax.merging.methods.registry import methods

    if os.path.isfile(name):
        return judged_algorithm(
            Path(name),
            signature,
            parameters=parameters,
            allow_missing=allow_missing,
            trial=trial,
        )
    if name not in methods():
        raise not_found(name)
    if problem := wrong_number_of_experts(name, len(signature.slots)):
        raise UserError(f"{problem}; give --expert NAME=MODEL once per expert")
    method = methods()[name]
    try:
        algorithm = method.bind(**parameters)
    except UserError as error:
        if not parameters.keys() <= {p.name for p in method.hyperparameters}:
            raise  # the message lists all names
        listed = ", ".join(f"{p.name} = {p.default!r}" for p in method.hyperparameters)
        raise UserError(f"{error} (hyperparameters: {listed or 'none'})") from None
    return algorithm, source_of_method(name)


def not_found(name: str) -> UserError:
    """Return the error for a name that is neither a file nor a shipped method."""
    from sdjax.merging.methods.registry import methods

    if os.path.isfile(f"{name}.py"):
        return UserError(f"{name}: no such file or merge method; did you mean {name}.py?")
    kind = "no such file" if name.endswith(".py") else "no such file or merge method"
    return UserError(f"{name}: {kind}; {did_you_mean(name, methods(), 'see `sdjax methods`')}")


def wrong_number_of_experts(name: str, count: int) -> str:
    """Return what is wrong if a shipped method does not take that many experts, else ""."""
    from sdjax.merging.methods.registry import methods

    schema = methods()[name].schema
    fewest, most = schema.min_models, schema.max_models
    # A base that is one of the models limits recipes only: the function takes any number.
    if schema.base == "first" or (fewest <= count and (most is None or count <= most)):
        return ""
    allowed = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
    return f"{name} takes {allowed} expert{'' if fewest == 1 else 's'}, not {count}"


def source_of_method(name: str) -> str:
    """Return the source text of a shipped method, which the sandbox admits like any program."""
    from sdjax.merging.methods.registry import methods

    return inspect.getsource(inspect.getmodule(methods()[name].algorithm.function))  # type: ignore[arg-type]


def judged_algorithm(
    file: Path,
    signature: MergeSignature,
    *,
    parameters: Mapping[str, Any],
    allow_missing: Collection[str] = (),
    trial: MergeTrial | None = None,
) -> tuple[Algorithm, str]:
    """Return the algorithm in a program file with hyperparameters, and the file's text.

    This process never executes the file itself, only the array programs that the sandbox has
    verified.

    Args:
        file: Python file that defines `merge_models` or `merge_trees`.
        signature: expert slots, tensors and limits.
        parameters: values of hyperparameters by name. None means values that are set later, by
            `Algorithm.bind`; only traced hyperparameters may have them.
        allow_missing: layers of confinement that this machine may lack.
        trial: what the merge will compile, if the program is tried first.

    Raises:
        UserError: the file cannot be read, the program is refused, or a layer is missing.
    """
    from sdjax.programs.program_file import read_program
    from sdjax.sandbox.algorithm import to_algorithm
    from sdjax.sandbox.sandbox import Sandbox

    source = read_program(file, signature.limits.source_bytes)
    signature = replace(signature, parameters=tuple(parameters.items()))
    with Sandbox(signature, workers=1, allow_missing=allow_missing) as sandbox:
        verdict = sandbox.judge(source, name=file.name)
        if verdict.program is None or verdict.ir is None:
            raise UserError(f"{file}: {verdict.verdict} ({verdict.rule}): {verdict.message}")
        if trial is not None and (refusal := sandbox.try_merge(verdict.ir, trial)):
            raise UserError(f"{file}: {refusal.verdict} ({refusal.rule}): {refusal.message}")
    algorithm = to_algorithm(verdict.program, name=file.stem)
    traced = {
        key: value
        for key, value in parameters.items()
        if key in algorithm.traced and value is not None
    }
    return algorithm.bind(**traced), source
