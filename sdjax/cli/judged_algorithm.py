"""Algorithms from program files, admitted by the sandbox first."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.merging.algorithm import Algorithm
    from sdjax.sandbox.signature import MergeSignature


def judged_algorithm(
    file: Path, signature: MergeSignature, *, allow_missing: Collection[str] = ()
) -> tuple[Algorithm, str]:
    """Return the algorithm in a program file, and the file's text.

    This process never executes the file itself, only the array programs that the sandbox has
    verified.

    Args:
        file: Python file that defines `merge_models` or `merge_trees`.
        signature: expert slots, tensors and limits.
        allow_missing: layers of confinement that this machine may lack.

    Raises:
        UserError: the file cannot be read, the program is refused (the message says why), or a
            layer of confinement is missing.
    """
    from sdjax.sandbox.algorithm import to_algorithm
    from sdjax.sandbox.sandbox import Sandbox

    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); pass a Python file") from error
    with Sandbox(signature, workers=1, allow_missing=allow_missing) as sandbox:
        verdict = sandbox.judge(source, name=file.name)
    if not verdict.admitted:
        raise UserError(f"{file}: {verdict.verdict} ({verdict.rule}): {verdict.message}")
    assert verdict.program is not None
    return to_algorithm(verdict.program, name=file.stem), source
