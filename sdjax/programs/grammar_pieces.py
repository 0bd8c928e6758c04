"""Building blocks of random merge programs: constants, names, expressions.

Every block is a small function that returns Python code in the algorithm API. Constants have one or
two decimals; more digits would cost tokens without noticeably changing a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Names:
    """A naming scheme. Each program uses one, because a tiny model cannot track arbitrary names.

    Attributes:
        experts: names of the experts' tensors.
        each: name of the loop variable, and of the parameter of the helper function.
        merged: name of the result.
        helper: name of the helper function.
        weights: name of the coefficients.
    """

    experts: tuple[str, ...]
    each: str
    merged: str
    helper: str
    weights: str


SCHEMES = (
    Names(experts=("a", "b", "c", "d", "e"), each="v", merged="m", helper="f", weights="w"),
    Names(experts=("x", "y", "z", "u", "q"), each="v", merged="out", helper="g", weights="w"),
    Names(
        experts=("t1", "t2", "t3", "t4", "t5"),
        each="t",
        merged="merged",
        helper="shape",
        weights="w",
    ),
)
SCHEME_SHARES = (0.5, 0.25, 0.25)


def number(rng: np.random.Generator, low: float, high: float) -> str:
    """Return a random literal in [low, high] with one or two decimals, never zero."""
    digits = 1 if rng.random() < 0.5 and high - low >= 0.3 else 2
    value = round(float(rng.uniform(low, high)), digits)
    if value == 0.0:
        value = 10.0**-digits
    return f"{value:.{digits}f}"


def literal(rng: np.random.Generator, value: float) -> str:
    """Return `value` rounded to one or two decimals, never zero."""
    digits = 1 if rng.random() < 0.4 else 2
    rounded = round(value, digits)
    if rounded == 0.0:
        rounded = 10.0**-digits if value >= 0 else -(10.0**-digits)
    return f"{rounded:.{digits}f}"


def strength(rng: np.random.Generator) -> float:
    """Sample the sum of a program's coefficients: about 1, between 0.3 and 2.5."""
    return float(np.clip(np.exp(rng.normal(0.05, 0.45)), 0.3, 2.5))


def coefficients(rng: np.random.Generator, count: int) -> list[str]:
    """Sample coefficients of `count` experts; often one of them is small or negative."""
    total = strength(rng)
    shares = rng.dirichlet([2.0] * count) * total
    if count > 1 and rng.random() < 0.35:
        low = int(rng.integers(count))
        others = [i for i in range(count) if i != low]
        shares[others] *= total / max(float(shares[others].sum()), 1e-3)
        shares[low] = rng.uniform(-0.5, 0.12)
    return [literal(rng, float(np.clip(share, -0.9, 2.0))) for share in shares]


def linear(weights: Sequence[str], terms: Sequence[str]) -> str:
    """Return `w1 * x1 + w2 * x2 ...`, with negative coefficients as subtractions."""
    text = f"{weights[0]} * {terms[0]}"
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        sign, size = ("-", weight[1:]) if weight.startswith("-") else ("+", weight)
        text += f" {sign} {size} * {term}"
    return text


def complement(constant: str) -> str:
    """Return 1 minus a literal, with the same number of decimals."""
    digits = len(constant.split(".")[1])
    return f"{1 - float(constant):.{digits}f}"


# Shapers: expressions of one tensor that keep its shape and roughly its magnitude.


def spread(rng: np.random.Generator, v: str) -> str:
    """Return an expression for the typical magnitude of a tensor's entries."""
    return f"jnp.std({v})" if rng.random() < 0.6 else f"jnp.mean(jnp.abs({v}))"


def magnitude_trim(rng: np.random.Generator, v: str) -> str:
    """Keep entries on one side of a magnitude threshold."""
    form = rng.random()
    if form < 0.15:  # drop outliers instead of small entries
        return f"jnp.where(jnp.abs({v}) < {number(rng, 1.2, 3.0)} * {spread(rng, v)}, {v}, 0)"
    threshold = f"jnp.abs({v}) > {number(rng, 0.2, 1.8)} * {spread(rng, v)}"
    if form < 0.65:
        return f"jnp.where({threshold}, {v}, 0)"
    if form < 0.85:
        return f"jnp.where({threshold}, {v}, {number(rng, 0.1, 0.7)} * {v})"
    return f"{v} * ({threshold})"


def clip(rng: np.random.Generator, v: str) -> str:
    """Clip entries to a range."""
    k, s = number(rng, 0.4, 2.5), spread(rng, v)
    return f"jnp.clip({v}, -{k} * {s}, {k} * {s})"


def row_mean(rng: np.random.Generator, v: str) -> str:
    """Mix entries with their row or column mean."""
    axis = ("0", "1", "-1")[int(rng.choice(3, p=(0.4, 0.4, 0.2)))]
    mean = f"jnp.mean({v}, axis={axis}, keepdims=True)"
    form = rng.random()
    if form < 0.6:
        k = number(rng, 0.2, 0.95)
        return f"{k} * {v} + {complement(k)} * {mean}"
    if form < 0.8:
        return f"{v} + {number(rng, 0.2, 1.5)} * {mean}"
    return f"{v} - {number(rng, 0.2, 1.2)} * {mean}"


def saturation(rng: np.random.Generator, v: str) -> str:
    """Apply tanh."""
    s = spread(rng, v)
    if rng.random() < 0.5:
        return f"{s} * jnp.tanh({v} / {s})"
    k = number(rng, 0.5, 2.0)
    return f"{k} * {s} * jnp.tanh({v} / {s})"


def sign_only(rng: np.random.Generator, v: str) -> str:
    """Replace entries with their sign, times one magnitude."""
    if rng.random() < 0.4:
        return f"jnp.sign({v}) * {spread(rng, v)}"
    return f"{number(rng, 0.3, 1.3)} * jnp.sign({v}) * {spread(rng, v)}"


def center(rng: np.random.Generator, v: str) -> str:
    """Subtract the mean."""
    return f"{v} - {number(rng, 0.5, 2.0)} * jnp.mean({v})"


def soft_gate(rng: np.random.Generator, v: str) -> str:
    """Weight entries by an exponential of their magnitude."""
    gate = f"jnp.exp(-{number(rng, 0.2, 1.5)} * jnp.abs({v}) / {spread(rng, v)})"
    return f"{v} * {gate}" if rng.random() < 0.4 else f"{v} * (1 - {gate})"


def power(rng: np.random.Generator, v: str) -> str:
    """Multiply entries by their magnitude."""
    text = f"{v} * jnp.abs({v}) / {spread(rng, v)}"
    return text if rng.random() < 0.4 else f"{number(rng, 0.4, 1.2)} * {text}"


T = TypeVar("T")
Shaper = Callable[[np.random.Generator, str], str]
# Weights and shapers; each shaper has the name of its family (see families.py).
SHAPERS: tuple[tuple[float, Shaper], ...] = (
    (2.6, magnitude_trim),
    (1.6, clip),
    (2.2, row_mean),
    (1.4, saturation),
    (1.2, sign_only),
    (0.7, center),
    (1.2, soft_gate),
    (1.1, power),
)


def draw_shaper(rng: np.random.Generator) -> tuple[str, Shaper]:
    """Return a random shaper, preceded by its family."""
    shaper = draw_weighted(rng, SHAPERS)
    return shaper.__name__, shaper


def draw_weighted(rng: np.random.Generator, weighted: Sequence[tuple[float, T]]) -> T:
    """Return a random item of pairs of weight and item."""
    weights = np.array([weight for weight, _ in weighted])
    return weighted[int(rng.choice(len(weighted), p=weights / weights.sum()))][1]
