"""Edits that break a valid program so that the sandbox must refuse it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import numpy as np

Fault = Callable[[np.random.Generator, str, int], str | None]

_FORBIDDEN = ("import os", "import sys", "import subprocess", "import socket", "import torch")


def _returned(text: str) -> tuple[str, str]:
    """Return the text before the last `return`, and the returned expression."""
    at = text.rindex("return ")
    return text[:at], text[at + len("return ") :]


def _with_jnp(text: str) -> str:
    return text if text.startswith("import") else f"import jax.numpy as jnp\n\n{text}"


def wrong_shape(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Make the program return a tensor of a different shape."""
    before, value = _returned(text)
    wrapped = (
        f"jnp.sum({value})",
        f"({value})[0]",
        f"({value}).T",
        f"jnp.mean({value}, axis=1)",
        f"jnp.stack([{value}, {value}])",
        f"jnp.linalg.norm({value})",
    )[int(rng.choice(6, p=(0.25, 0.2, 0.15, 0.2, 0.05, 0.15)))]
    changed = f"{before}return {wrapped}"
    return _with_jnp(changed) if "jnp." in wrapped else changed


def undefined_name(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Remove the assignment of a name that is used later."""
    lines = text.split("\n")
    bound = [i for i, line in enumerate(lines) if re.match(r"    \w+ = ", line)]
    if not bound:
        return None
    drop = bound[int(rng.integers(len(bound)))]
    name = lines[drop].split()[0]
    rest = "\n".join(lines[:drop] + lines[drop + 1 :])
    try:
        nodes = list(ast.walk(ast.parse(rest)))
    except SyntaxError:
        return None
    uses = [n.ctx for n in nodes if isinstance(n, ast.Name) and n.id == name]
    if not uses or any(isinstance(use, ast.Store) for use in uses):
        return None
    return rest


def missing_expert(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Read an expert that does not exist."""
    if '"expert_' not in text or " in w" in text:
        return None
    name = rng.choice(re.findall(r'"expert_\d"', text))
    wrong = (f'"expert_{slots + 1}"', '"expert_0"', '"base"')[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    return text.replace(name, wrong, 1)


def not_finite(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Make the program return values that are not finite."""
    before, value = _returned(text)
    wrapped = (
        f"jnp.log({value})",
        f"jnp.sqrt({value})",
        f"({value}) / 0.0",
        f"({value}) / jnp.zeros_like({value})",
    )[int(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1)))]
    changed = f"{before}return {wrapped}"
    return _with_jnp(changed) if "jnp." in wrapped else changed


def forbidden_import(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Import a forbidden module."""
    line = _FORBIDDEN[int(rng.integers(len(_FORBIDDEN)))]
    return f"{line}\n{text}" if text.startswith("import") else f"{line}\n\n{text}"


def syntax_error(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Introduce a syntax error."""
    form = rng.random()
    if form < 0.5:
        closing = [m.start() for m in re.finditer(r"[)\]]", text)]
        at = closing[int(rng.integers(len(closing)))]
        return text[:at] + text[at + 1 :]
    if form < 0.75:
        return text.replace("):\n", ")\n", 1)
    before, value = _returned(text)
    return f"{before}return {value} *"


def branch_on_values(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Branch on the value of a tensor."""
    before, value = _returned(text)
    test = f'task_vectors["expert_{rng.integers(1, slots + 1)}"].mean() > 0'
    return f"{before}if {test}:\n        return {value}\n    return 0"


def returns_nothing(rng: np.random.Generator, text: str, slots: int) -> str | None:
    """Make the program return nothing."""
    before, value = _returned(text)
    return f"{before}result = {value}"


FAULTS: tuple[tuple[float, Fault], ...] = (
    (0.26, wrong_shape),
    (0.16, undefined_name),
    (0.12, missing_expert),
    (0.16, not_finite),
    (0.08, forbidden_import),
    (0.12, syntax_error),
    (0.06, branch_on_values),
    (0.04, returns_nothing),
)


def break_source(rng: np.random.Generator, text: str, slots: int) -> str:
    """Return `text` with one random edit that makes the sandbox refuse it."""
    shares = np.array([share for share, _ in FAULTS])
    while True:
        fault = FAULTS[int(rng.choice(len(FAULTS), p=shares / shares.sum()))][1]
        broken = fault(rng, text, slots)
        if broken is not None and broken != text:
            return broken
