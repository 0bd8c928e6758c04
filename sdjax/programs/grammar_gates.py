"""Gates of random merge programs: weights of one tensor that depend on its layer or its kind.

Task vectors are rarely useful in all layers and kinds of tensors. A gate keeps an expert where it
helps, for instance in the first half of the layers, or everywhere but in `down_proj`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdjax.programs.grammar_pieces import draw_weighted, number

KINDS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DEPTH, KIND = "depth_ramp", "kind_gate"  # families of the gates

Factor = Callable[[np.random.Generator], str]


def levels(rng: np.random.Generator) -> tuple[str, str]:
    """Return a large and a small weight, in random order."""
    high, low = number(rng, 0.6, 1.6), number(rng, 0.02, 0.45)
    return (high, low) if rng.random() < 0.5 else (low, high)


def step(rng: np.random.Generator) -> str:
    """Change the weight at one depth."""
    first, second = levels(rng)
    sign = "<" if rng.random() < 0.7 else ">"
    return f"jnp.where(depth {sign} {number(rng, 0.15, 0.85)}, {first}, {second})"


def ramp(rng: np.random.Generator) -> str:
    """Change the weight linearly with the depth."""
    form = rng.random()
    if form < 0.35:
        return f"({number(rng, 0.05, 0.5)} + {number(rng, 0.3, 1.2)} * depth)"
    if form < 0.7:
        start = number(rng, 0.5, 1.4)
        return f"({start} - {number(rng, 0.3, 0.95 * float(start))} * depth)"
    return f"{number(rng, 0.6, 1.7)} * " + ("depth" if form < 0.85 else "(1 - depth)")


def bump(rng: np.random.Generator) -> str:
    """Give the middle layers the largest weight, or the smallest."""
    if rng.random() < 0.6:
        return f"{number(rng, 1.5, 5.0)} * depth * (1 - depth)"
    if rng.random() < 0.5:
        return f"({number(rng, 0.05, 0.5)} + {number(rng, 1.0, 4.0)} * depth * (1 - depth))"
    return f"({number(rng, 0.8, 1.5)} - {number(rng, 1.5, 4.0)} * depth * (1 - depth))"


def window(rng: np.random.Generator) -> str:
    """Change the weight between two depths."""
    first, second = levels(rng)
    if rng.random() < 0.6:
        low, high = number(rng, 0.1, 0.45), number(rng, 0.5, 0.9)
        return f"jnp.where((depth > {low}) & (depth < {high}), {first}, {second})"
    middle, width = number(rng, 0.2, 0.8), number(rng, 0.15, 0.45)
    return f"jnp.where(jnp.abs(depth - {middle}) < {width}, {first}, {second})"


FACTORS: tuple[tuple[float, Factor], ...] = ((5.0, step), (2.0, ramp), (1.5, bump), (1.5, window))


def draw_factor(rng: np.random.Generator) -> str:
    """Return a random weight that depends on the depth."""
    return draw_weighted(rng, FACTORS)(rng)


def condition(rng: np.random.Generator) -> str:
    """Return a condition on the kind of the tensor."""
    kind = KINDS[int(rng.choice(3, p=(0.25, 0.25, 0.5)))]
    form = rng.random()
    if form < 0.6:
        return f'kind == "{kind}"'
    if form < 0.8:
        return f'kind != "{kind}"'
    if form < 0.9:
        return f'kind.endswith("{kind.removeprefix("mlp.")}")'
    first, second = (k for k in KINDS if k != kind)
    return f'kind in ("{first}", "{second}")'


def depth_gate(rng: np.random.Generator, v: str) -> list[str]:
    """Return a statement that weights a tensor by its depth."""
    return [f"{v} = {draw_factor(rng)} * {v}"]


def kind_gate(rng: np.random.Generator, v: str) -> list[str]:
    """Return statements that weight a tensor by its kind."""
    if rng.random() < 0.35:
        first, second = levels(rng)
        return [f"{v} = ({first} if {condition(rng)} else {second}) * {v}"]
    weight = number(rng, 0.02, 0.45) if rng.random() < 0.7 else number(rng, 1.1, 2.0)
    return [f"if {condition(rng)}:", f"    {v} = {weight} * {v}"]


def kind_and_depth_gate(rng: np.random.Generator, v: str) -> list[str]:
    """Return statements that weight a tensor by its depth in some kinds only."""
    return [f"if {condition(rng)}:", f"    {v} = {draw_factor(rng)} * {v}"]


Gate = Callable[[np.random.Generator, str], list[str]]
GATES: tuple[tuple[float, tuple[Gate, frozenset[str]]], ...] = (
    (5.5, (depth_gate, frozenset({DEPTH}))),
    (3.2, (kind_gate, frozenset({KIND}))),
    (1.3, (kind_and_depth_gate, frozenset({DEPTH, KIND}))),
)


def draw_gate(rng: np.random.Generator, v: str) -> tuple[list[str], frozenset[str]]:
    """Return the statements of a random gate of the tensor `v`, and its families."""
    gate, families = draw_weighted(rng, GATES)
    return gate(rng, v), families
