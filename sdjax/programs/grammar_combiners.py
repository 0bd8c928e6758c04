"""Combiners of random merge programs: statements and a final expression over the experts' names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sdjax.programs.grammar_pieces import (
    Names,
    coefficients,
    complement,
    draw_weighted,
    linear,
    literal,
    number,
    spread,
    strength,
)

Combined = tuple[list[str], str, set[str]]  # statements, expression, families


def weighted_sum(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Add the experts with different coefficients."""
    families = {"weighted_sum"} if len(terms) > 1 else set()
    return [], linear(coefficients(rng, len(terms)), terms), families


def scaling(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Scale the sum of the experts."""
    k = literal(rng, strength(rng) / len(terms))
    if len(terms) == 1:
        return [], f"{k} * {terms[0]}", set()
    if rng.random() < 0.25:
        negative = int(rng.integers(1, len(terms)))
        signs = ["-" if i == negative else "+" for i in range(1, len(terms))]
    else:
        signs = ["+"] * (len(terms) - 1)
    total = terms[0] + "".join(f" {s} {t}" for s, t in zip(signs, terms[1:], strict=True))
    return [], f"{k} * ({total})", {"scaling"}


def mean(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Average the experts."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    total = f"({' + '.join(terms)}) / {len(terms)}"
    if rng.random() < 0.3:
        return [], total, {"mean"}
    return [], f"{literal(rng, strength(rng))} * {total}", {"mean", "scaling"}


def interpolation(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Interpolate between the experts, one at a time."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    m = names.merged
    lines = []
    if rng.random() < 0.5:
        k = number(rng, 0.1, 0.95)
        lines.append(f"{m} = {k} * {order[0]} + {complement(k)} * {order[1]}")
        for term in order[2:]:
            k = number(rng, 0.2, 0.95)
            lines.append(f"{m} = {k} * {m} + {complement(k)} * {term}")
    else:
        lines.append(f"{m} = {order[0]} + {number(rng, 0.1, 0.9)} * ({order[1]} - {order[0]})")
        for term in order[2:]:
            lines.append(f"{m} = {m} + {number(rng, -0.2, 0.8)} * ({term} - {m})")
    last = m if rng.random() < 0.3 else f"{literal(rng, strength(rng))} * {m}"
    return lines, last, {"interpolation"}


def norm_text(rng: np.random.Generator, v: str) -> str:
    """Return an expression for the norm of a tensor."""
    return f"jnp.linalg.norm({v})" if rng.random() < 0.75 else f"jnp.sqrt(jnp.sum({v} * {v}))"


def norm_balance(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Add the experts after equalizing their norms, or weighted by their norms."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    m, k = names.merged, coefficients(rng, len(terms))
    norm = "jnp.linalg.norm" if rng.random() < 0.7 else "jnp.std"
    form = rng.random()
    if form < 0.35:  # the other experts scaled to the norm of the first
        first = terms[0]
        scaled = [first] + [f"{t} * n / {norm}({t})" for t in terms[1:]]
        return [f"n = {norm}({first})"], linear(k, scaled), {"norm_balance", "weighted_sum"}
    if form < 0.7:  # unit vectors, scaled to the norm of one expert
        units = [f"{t} / {norm}({t})" for t in terms]
        chosen = terms[int(rng.integers(len(terms)))]
        lines = [f"{m} = {linear(k, units)}"]
        return lines, f"{m} * {norm}({chosen})", {"norm_balance", "weighted_sum"}
    sizes = [f"n{i}" for i in range(1, len(terms) + 1)]
    lines = [f"{n} = {norm}({t})" for n, t in zip(sizes, terms, strict=True)]
    products = " + ".join(f"{n} * {t}" for n, t in zip(sizes, terms, strict=True))
    scale = literal(rng, strength(rng))
    return lines, f"{scale} * ({products}) / ({' + '.join(sizes)})", {"norm_balance"}


def sign_gate(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Select entries where the signs of two experts agree."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q, rest = order[0], order[1], order[2:]
    agree = f"{p} * {q} > 0" if rng.random() < 0.6 else f"jnp.sign({p}) == jnp.sign({q})"
    inside = linear(coefficients(rng, 2), (p, q))
    outside = "0" if rng.random() < 0.4 else f"{number(rng, 0.1, 0.9)} * {(p, q)[rng.integers(2)]}"
    gated = f"jnp.where({agree}, {inside}, {outside})"
    lines, result, unused = [], gated, rest
    if rest and rng.random() < 0.85:
        lines, unused = [f"{names.merged} = {gated}"], rest[1:]
        outer = [number(rng, 0.6, 1.2), number(rng, -0.3, 0.8)]
        result = linear(outer, [names.merged, rest[0]])
    return lines, result, {"sign_gate", "weighted_sum"} | ({"subset"} if unused else set())


def extremes(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Take the elementwise maximum or minimum of two experts."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    pair = f"({order[0]}, {order[1]})"
    if rng.random() < 0.4:
        k = coefficients(rng, 2)
        parts = [f"jnp.maximum{pair}", f"jnp.minimum{pair}"]
    else:
        k = coefficients(rng, len(terms) - 1)
        parts = [("jnp.maximum", "jnp.minimum")[rng.integers(2)] + pair]
    parts += order[2:]
    while len(k) < len(parts):
        k.append(number(rng, -0.3, 0.7))
    return [], linear(k, parts), {"extremes"}


def cosine_weight(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Scale the sum by the cosine similarity of two experts."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q = order[:2]
    line = f"s = jnp.sum({p} * {q}) / (jnp.linalg.norm({p}) * jnp.linalg.norm({q}))"
    sign = "+" if rng.random() < 0.6 else "-"
    gate = f"({number(rng, 0.3, 1.2)} {sign} {number(rng, 0.2, 1.5)} * s)"
    k = coefficients(rng, len(order))
    return [line], f"{gate} * ({linear(k, order)})", {"cosine_weight", "weighted_sum"}


def cross_gate(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Attenuate one expert where another is large."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q = order[:2]
    line = f"s = jnp.exp(-{number(rng, 0.2, 1.5)} * jnp.abs({p}) / {spread(rng, p)})"
    result = linear(coefficients(rng, len(order)), [p, f"s * {q}", *order[2:]])
    return [line], result, {"soft_gate", "weighted_sum"}


# Combiners that are held out of the training programs.


def max_magnitude(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Take the entries with the largest magnitude."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    m = names.merged
    lines = [f"{m} = jnp.where(jnp.abs({order[0]}) > jnp.abs({order[1]}), {order[0]}, {order[1]})"]
    for term in order[2:]:
        lines.append(f"{m} = jnp.where(jnp.abs({m}) > jnp.abs({term}), {m}, {term})")
    return lines, f"{literal(rng, strength(rng))} * {m}", {"max_magnitude"}


def projection_removal(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Combined:
    """Remove the projection of one expert onto another."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q = order[:2]
    line = f"r = {q} - jnp.sum({p} * {q}) / jnp.sum({p} * {p}) * {p}"
    result = linear(coefficients(rng, len(order)), [p, "r", *order[2:]])
    return [line], result, {"projection_removal", "weighted_sum"}


Combiner = Callable[[np.random.Generator, Sequence[str], Names], Combined]
COMBINERS: tuple[tuple[float, Combiner], ...] = (
    (4.0, weighted_sum),
    (1.0, scaling),
    (1.0, mean),
    (1.2, interpolation),
    (1.4, norm_balance),
    (1.4, sign_gate),
    (1.0, extremes),
    (0.7, cosine_weight),
    (0.7, cross_gate),
)
HELD_OUT_COMBINERS: tuple[tuple[float, Combiner], ...] = (
    (4.0, max_magnitude),
    (4.0, projection_removal),
)


def draw_combiner(rng: np.random.Generator, allow_held_out: bool) -> Combiner:
    """Return a random combiner."""
    return draw_weighted(rng, COMBINERS + HELD_OUT_COMBINERS if allow_held_out else COMBINERS)
