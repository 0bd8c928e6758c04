"""The pieces random merge programs are built of: constants, names, expressions.

Every piece is a small rule that returns Python text in the algorithm API. A rule that defines a
family (see `families.py`) is registered under that family's name. Constants have one or two
decimals: longer ones would cost tokens and add nothing a merge could feel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Names:
    """One naming scheme; a program keeps to one, since a tiny model cannot follow free names."""

    experts: tuple[str, ...]
    each: str  # the loop variable and the helper's parameter
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
    """A literal in [low, high] with one or two decimals, never zero."""
    digits = 1 if rng.random() < 0.5 and high - low >= 0.3 else 2
    value = round(float(rng.uniform(low, high)), digits)
    if value == 0.0:
        value = 10.0**-digits
    return f"{value:.{digits}f}"


def literal(rng: np.random.Generator, value: float) -> str:
    """`value` rounded to one or two decimals, never zero."""
    digits = 1 if rng.random() < 0.4 else 2
    rounded = round(value, digits)
    if rounded == 0.0:
        rounded = 10.0**-digits if value >= 0 else -(10.0**-digits)
    return f"{rounded:.{digits}f}"


def strength(rng: np.random.Generator) -> float:
    """The sum of a program's coefficients: about 1, between 0.3 and 2.5."""
    return float(np.clip(np.exp(rng.normal(0.05, 0.45)), 0.3, 2.5))


def coefficients(rng: np.random.Generator, count: int) -> list[str]:
    """Own coefficients for `count` experts; often one expert is played down or subtracted."""
    total = strength(rng)
    shares = rng.dirichlet([2.0] * count) * total
    if count > 1 and rng.random() < 0.35:
        odd = int(rng.integers(count))
        others = [i for i in range(count) if i != odd]
        shares[others] *= total / max(float(shares[others].sum()), 1e-3)
        shares[odd] = rng.uniform(-0.5, 0.12)
    return [literal(rng, float(np.clip(share, -0.9, 2.0))) for share in shares]


def linear(weights: Sequence[str], terms: Sequence[str]) -> str:
    """`w1 * x1 + w2 * x2 ...`, a negative coefficient written as a subtraction."""
    text = f"{weights[0]} * {terms[0]}"
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        sign, size = ("-", weight[1:]) if weight.startswith("-") else ("+", weight)
        text += f" {sign} {size} * {term}"
    return text


def complement(constant: str) -> str:
    """One minus a literal, with as many decimals."""
    digits = len(constant.split(".")[1])
    return f"{1 - float(constant):.{digits}f}"


# Shapers: an expression over one tensor's name, of that tensor's shape and about its size.


def spread(rng: np.random.Generator, v: str) -> str:
    return f"jnp.std({v})" if rng.random() < 0.6 else f"jnp.mean(jnp.abs({v}))"


def magnitude_trim(rng: np.random.Generator, v: str) -> str:
    form = rng.random()
    if form < 0.15:  # drop the outliers instead of the small entries
        return f"jnp.where(jnp.abs({v}) < {number(rng, 1.2, 3.0)} * {spread(rng, v)}, {v}, 0)"
    threshold = f"jnp.abs({v}) > {number(rng, 0.2, 1.8)} * {spread(rng, v)}"
    if form < 0.65:
        return f"jnp.where({threshold}, {v}, 0)"
    if form < 0.85:
        return f"jnp.where({threshold}, {v}, {number(rng, 0.1, 0.7)} * {v})"
    return f"{v} * ({threshold})"


def clip(rng: np.random.Generator, v: str) -> str:
    k, s = number(rng, 0.4, 2.5), spread(rng, v)
    return f"jnp.clip({v}, -{k} * {s}, {k} * {s})"


def row_mean(rng: np.random.Generator, v: str) -> str:
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
    s = spread(rng, v)
    if rng.random() < 0.5:
        return f"{s} * jnp.tanh({v} / {s})"
    k = number(rng, 0.5, 2.0)
    return f"{k} * {s} * jnp.tanh({v} / {s})"


def sign_only(rng: np.random.Generator, v: str) -> str:
    if rng.random() < 0.4:
        return f"jnp.sign({v}) * {spread(rng, v)}"
    return f"{number(rng, 0.3, 1.3)} * jnp.sign({v}) * {spread(rng, v)}"


def centre(rng: np.random.Generator, v: str) -> str:
    return f"{v} - {number(rng, 0.5, 2.0)} * jnp.mean({v})"


def soft_gate(rng: np.random.Generator, v: str) -> str:
    gate = f"jnp.exp(-{number(rng, 0.2, 1.5)} * jnp.abs({v}) / {spread(rng, v)})"
    return f"{v} * {gate}" if rng.random() < 0.4 else f"{v} * (1 - {gate})"


def power(rng: np.random.Generator, v: str) -> str:
    text = f"{v} * jnp.abs({v}) / {spread(rng, v)}"
    return text if rng.random() < 0.4 else f"{number(rng, 0.4, 1.2)} * {text}"


Shaper = Callable[[np.random.Generator, str], str]
SHAPERS: dict[str, tuple[float, Shaper]] = {
    "magnitude_trim": (2.6, magnitude_trim),
    "clip": (1.6, clip),
    "row_mean": (2.2, row_mean),
    "saturation": (1.4, saturation),
    "sign_only": (1.2, sign_only),
    "centre": (0.7, centre),
    "soft_gate": (1.2, soft_gate),
    "power": (1.1, power),
}


def draw_shaper(rng: np.random.Generator) -> tuple[str, Shaper]:
    names = list(SHAPERS)
    shares = np.array([SHAPERS[name][0] for name in names])
    name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    return name, SHAPERS[name][1]


# Combiners: lines and a last expression over the experts' names.

Piece = tuple[list[str], str, set[str]]  # lines before, expression, families


def weighted_sum(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    families = {"weighted_sum"} if len(terms) > 1 else set()
    return [], linear(coefficients(rng, len(terms)), terms), families


def scaling(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    k = literal(rng, strength(rng) / len(terms))
    if len(terms) == 1:
        return [], f"{k} * {terms[0]}", set()
    if rng.random() < 0.25:
        odd = int(rng.integers(1, len(terms)))
        signs = ["-" if i == odd else "+" for i in range(1, len(terms))]
    else:
        signs = ["+"] * (len(terms) - 1)
    total = terms[0] + "".join(f" {s} {t}" for s, t in zip(signs, terms[1:], strict=True))
    return [], f"{k} * ({total})", {"scaling"}


def mean(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    total = f"({' + '.join(terms)}) / {len(terms)}"
    if rng.random() < 0.3:
        return [], total, {"mean"}
    return [], f"{literal(rng, strength(rng))} * {total}", {"mean", "scaling"}


def interpolation(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
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
    return f"jnp.linalg.norm({v})" if rng.random() < 0.75 else f"jnp.sqrt(jnp.sum({v} * {v}))"


def norm_balance(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    m, k = names.merged, coefficients(rng, len(terms))
    norm = "jnp.linalg.norm" if rng.random() < 0.7 else "jnp.std"
    form = rng.random()
    if form < 0.35:  # the others brought to the first one's norm
        first = terms[0]
        scaled = [first] + [f"{t} * n / {norm}({t})" for t in terms[1:]]
        return [f"n = {norm}({first})"], linear(k, scaled), {"norm_balance", "weighted_sum"}
    if form < 0.7:  # unit directions, brought back to one expert's size
        units = [f"{t} / {norm}({t})" for t in terms]
        chosen = terms[int(rng.integers(len(terms)))]
        lines = [f"{m} = {linear(k, units)}"]
        return lines, f"{m} * {norm}({chosen})", {"norm_balance", "weighted_sum"}
    sizes = [f"n{i}" for i in range(1, len(terms) + 1)]
    lines = [f"{n} = {norm}({t})" for n, t in zip(sizes, terms, strict=True)]
    products = " + ".join(f"{n} * {t}" for n, t in zip(sizes, terms, strict=True))
    scale = literal(rng, strength(rng))
    return lines, f"{scale} * ({products}) / ({' + '.join(sizes)})", {"norm_balance"}


def sign_gate(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q, rest = order[0], order[1], order[2:]
    agree = f"{p} * {q} > 0" if rng.random() < 0.6 else f"jnp.sign({p}) == jnp.sign({q})"
    inside = linear(coefficients(rng, 2), (p, q))
    outside = "0" if rng.random() < 0.4 else f"{number(rng, 0.1, 0.9)} * {(p, q)[rng.integers(2)]}"
    gated = f"jnp.where({agree}, {inside}, {outside})"
    families = {"sign_gate", "weighted_sum"}
    if rest and rng.random() < 0.85:
        return (
            [f"{names.merged} = {gated}"],
            linear([number(rng, 0.6, 1.2), number(rng, -0.3, 0.8)], [names.merged, rest[0]]),
            families,
        )
    return [], gated, families | ({"subset"} if rest else set())


def extremes(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
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


def cosine_weight(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q = order[:2]
    line = f"s = jnp.sum({p} * {q}) / (jnp.linalg.norm({p}) * jnp.linalg.norm({q}))"
    sign = "+" if rng.random() < 0.6 else "-"
    gate = f"({number(rng, 0.3, 1.2)} {sign} {number(rng, 0.2, 1.5)} * s)"
    k = coefficients(rng, len(order))
    return [line], f"{gate} * ({linear(k, order)})", {"cosine_weight", "weighted_sum"}


def cross_gate(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    """One expert fades where another is large."""
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q = order[:2]
    line = f"s = jnp.exp(-{number(rng, 0.2, 1.5)} * jnp.abs({p}) / {spread(rng, p)})"
    return (
        [line],
        linear(coefficients(rng, len(order)), [p, f"s * {q}", *order[2:]]),
        {
            "soft_gate",
            "weighted_sum",
        },
    )


# Held out of training.


def max_magnitude(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    m = names.merged
    lines = [f"{m} = jnp.where(jnp.abs({order[0]}) > jnp.abs({order[1]}), {order[0]}, {order[1]})"]
    for term in order[2:]:
        lines.append(f"{m} = jnp.where(jnp.abs({m}) > jnp.abs({term}), {m}, {term})")
    return lines, f"{literal(rng, strength(rng))} * {m}", {"max_magnitude"}


def projection_removal(rng: np.random.Generator, terms: Sequence[str], names: Names) -> Piece:
    if len(terms) == 1:
        return weighted_sum(rng, terms, names)
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    p, q = order[:2]
    line = f"r = {q} - jnp.sum({p} * {q}) / jnp.sum({p} * {p}) * {p}"
    return (
        [line],
        linear(coefficients(rng, len(order)), [p, "r", *order[2:]]),
        {
            "projection_removal",
            "weighted_sum",
        },
    )


Combiner = Callable[[np.random.Generator, Sequence[str], Names], Piece]
COMBINERS: dict[str, tuple[float, Combiner]] = {
    "weighted_sum": (4.0, weighted_sum),
    "scaling": (1.0, scaling),
    "mean": (1.0, mean),
    "interpolation": (1.2, interpolation),
    "norm_balance": (1.4, norm_balance),
    "sign_gate": (1.4, sign_gate),
    "extremes": (1.0, extremes),
    "cosine_weight": (0.7, cosine_weight),
    "soft_gate": (0.7, cross_gate),
}
HELD_OUT_COMBINERS: dict[str, tuple[float, Combiner]] = {
    "max_magnitude": (4.0, max_magnitude),
    "projection_removal": (4.0, projection_removal),
}


def draw_combiner(rng: np.random.Generator, allow_held_out: bool) -> Combiner:
    table = COMBINERS | HELD_OUT_COMBINERS if allow_held_out else COMBINERS
    names = list(table)
    shares = np.array([table[name][0] for name in names])
    return table[names[int(rng.choice(len(names), p=shares / shares.sum()))]][1]
