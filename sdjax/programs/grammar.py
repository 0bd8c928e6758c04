"""A grammar that samples random merge programs in the algorithm API.

The zoo's seed is trained on these programs, so they are short (60 to 110 tokens), use few naming
schemes, and vary in structure, operations and constants. Some are broken on purpose, because a
search needs a generator that can fail. The families in `sdjax.programs.families.HELD_OUT` are
excluded by default; they show whether a trained generator goes beyond its training programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdjax.programs.grammar_faults import break_source
from sdjax.programs.grammar_pieces import (
    SCHEME_SHARES,
    SCHEMES,
    Names,
    coefficients,
    draw_combiner,
    draw_shaper,
    linear,
    literal,
    mean,
    number,
    scaling,
    strength,
    weighted_sum,
)

FAULT_SHARE = 0.11
MIN_LENGTH, MAX_LENGTH = 90, 345  # characters
MIN_SLOTS, MAX_SLOTS = 2, 5  # numbers of experts


@dataclass(frozen=True, kw_only=True)
class RandomCandidate:
    """A random candidate.

    Attributes:
        text: source code.
        families: families of operations it was built from; empty if it is broken.
        fails: whether it is broken, so that the sandbox must refuse it.
    """

    text: str
    families: frozenset[str]
    fails: bool


@dataclass
class _Draft:
    """A candidate under construction: helper functions, requested inputs, statements, families."""

    helpers: list[str]
    requests: list[str]
    body: list[str]
    families: set[str]

    def text(self) -> str:
        """Return the source code."""
        head = f"def merge_models({', '.join(['task_vectors', *self.requests])}):"
        parts = [*self.helpers, "\n".join([head, *(f"    {line}" for line in self.body)])]
        source = "\n\n".join(parts)
        return f"import jax.numpy as jnp\n\n{source}" if "jnp." in source else source


def sample_candidate(
    rng: np.random.Generator, *, slots: int = 3, allow_held_out: bool = False
) -> RandomCandidate:
    """Sample the source of a random merge program.

    Args:
        rng: random generator.
        slots: number of experts, 2 to 5.
        allow_held_out: whether to use the held-out families, in about a third of the candidates.
    """
    if not MIN_SLOTS <= slots <= MAX_SLOTS:
        raise ValueError(f"slots must be between {MIN_SLOTS} and {MAX_SLOTS}, not {slots}")
    while True:
        draft = _draft(rng, slots, allow_held_out)
        text = draft.text()
        if MIN_LENGTH <= len(text) <= MAX_LENGTH + 30 * (slots - 3):
            break
    if rng.random() < FAULT_SHARE:
        text = break_source(rng, text, slots)
        return RandomCandidate(text=text, families=frozenset(), fails=True)
    return RandomCandidate(text=text, families=frozenset(draft.families), fails=False)


def _draft(rng: np.random.Generator, slots: int, allow_held_out: bool) -> _Draft:
    names = SCHEMES[int(rng.choice(len(SCHEMES), p=SCHEME_SHARES))]
    draft = _Draft(helpers=[], requests=[], body=[], families=set())
    structures = (_lines, _helper, _loop, _comprehension, _stack, _inline)
    structure = structures[int(rng.choice(6, p=(0.48, 0.14, 0.13, 0.11, 0.06, 0.08)))]
    structure(rng, draft, names, slots, allow_held_out)
    return draft


def _choose(rng: np.random.Generator, draft: _Draft, slots: int) -> list[int]:
    """Sample the experts that a program uses; return them in slot order."""
    draw = rng.random()
    count = slots if draw < 0.52 else slots - 1 if draw < 0.93 or slots == 2 else 1
    if count < slots:
        draft.families.add("subset")
    return sorted(int(i) for i in rng.choice(slots, size=count, replace=False))


def _load(
    rng: np.random.Generator, draft: _Draft, names: Names, used: list[int], slots: int
) -> list[str]:
    """Assign the used experts to variables; a variable name always refers to the same slot."""
    terms = [names.experts[i] for i in used]
    draw = rng.random()
    if len(used) == slots and draw < 0.4:
        draft.body.append(f"{', '.join(terms)} = task_vectors.values()")
    elif draw > 0.85 and len(used) > 1:
        short = "tv"
        draft.body.append(f"{short} = task_vectors")
        values = ", ".join(f'{short}["expert_{i + 1}"]' for i in used)
        draft.body.append(f"{', '.join(terms)} = {values}")
    else:
        for term, i in zip(terms, used, strict=True):
            draft.body.append(f'{term} = task_vectors["expert_{i + 1}"]')
    return terms


def _finish(rng: np.random.Generator, draft: _Draft, names: Names, result: str) -> None:
    """Add a statement that returns `result`, sometimes after one more operation on it."""
    draw = rng.random()
    m = names.merged
    if draw >= 0.36:
        draft.body.append(f"return {result}")
        return
    if result != m:
        draft.body.append(f"{m} = {result}")
    if draw < 0.13:
        draft.body.append(f"return {_depth_ramp(rng, draft, m)}")
    elif draw < 0.24:
        draft.body.append(f"return {_base_relative(rng, draft, m)}")
    else:
        family, shaper = draw_shaper(rng)
        draft.families.add(family)
        draft.body.append(f"return {shaper(rng, m)}")


def _depth_ramp(rng: np.random.Generator, draft: _Draft, m: str) -> str:
    draft.requests.append("depth")
    draft.families.add("depth_ramp")
    form = rng.random()
    if form < 0.45:
        sign = "+" if rng.random() < 0.6 else "-"
        return f"({number(rng, 0.5, 1.1)} {sign} {number(rng, 0.1, 0.6)} * depth) * {m}"
    if form < 0.75:
        low, high = number(rng, 0.1, 1.3), number(rng, 0.1, 1.3)
        return f"{m} * jnp.where(depth < {number(rng, 0.2, 0.8)}, {low}, {high})"
    return f"{m} * ({number(rng, 0.3, 0.9)} + {number(rng, 0.2, 1.2)} * depth * (1 - depth))"


def _base_relative(rng: np.random.Generator, draft: _Draft, m: str) -> str:
    draft.requests.append("base")
    draft.families.add("base_relative")
    form = rng.random()
    if form < 0.3:
        low = number(rng, 0.1, 0.7)
        return f"jnp.where({m} * base > 0, {m}, {low} * {m})"
    if form < 0.55:
        k = number(rng, 0.2, 1.5)
        low = number(rng, 0.1, 0.7)
        return f"jnp.where(jnp.abs(base) > {k} * jnp.std(base), {m}, {low} * {m})"
    if form < 0.8:
        draft.families.add("clip")
        k = number(rng, 0.1, 0.8)
        return f"jnp.clip({m}, -{k} * jnp.std(base), {k} * jnp.std(base))"
    k = number(rng, 0.1, 0.6)
    return f"{k} * {m} * jnp.std(base) / jnp.std({m})"


def _lines(
    rng: np.random.Generator, draft: _Draft, names: Names, slots: int, allow_held_out: bool
) -> None:
    """Write statements that load the experts, sometimes transform them, and combine them."""
    used = _choose(rng, draft, slots)
    terms = _load(rng, draft, names, used, slots)
    shaped = int(rng.choice(3, p=(0.58, 0.34, 0.08)))
    for i in sorted(rng.choice(len(terms), size=min(shaped, len(terms)), replace=False)):
        family, shaper = draw_shaper(rng)
        draft.families.add(family)
        draft.body.append(f"{terms[i]} = {shaper(rng, terms[i])}")
    if shaped == 0 and len(terms) > 1 and rng.random() < 0.07:
        _depth_blend(rng, draft, terms)
        return
    lines, result, families = draw_combiner(rng, allow_held_out)(rng, terms, names)
    draft.families |= families
    draft.body += lines
    _finish(rng, draft, names, result)


def _depth_blend(rng: np.random.Generator, draft: _Draft, terms: list[str]) -> None:
    """Use one expert in early layers and another in late layers."""
    draft.requests.append("depth")
    draft.families.add("depth_ramp")
    order = [terms[int(i)] for i in rng.permutation(len(terms))]
    k = coefficients(rng, len(order))
    parts = [f"depth * {order[0]}", f"(1 - depth) * {order[1]}", *order[2:]]
    draft.body.append(f"return {linear(k, parts)}")


def _helper(
    rng: np.random.Generator, draft: _Draft, names: Names, slots: int, allow_held_out: bool
) -> None:
    """Apply a helper function to some or all experts."""
    family, shaper = draw_shaper(rng)
    draft.families.add(family)
    v, f = names.each, names.helper
    if rng.random() < 0.25:
        draft.helpers.append(f"{f} = lambda {v}: {shaper(rng, v)}")
    else:
        draft.helpers.append(f"def {f}({v}):\n    return {shaper(rng, v)}")
    used = _choose(rng, draft, slots)
    terms = _load(rng, draft, names, used, slots)
    wrapped = [t if rng.random() < 0.3 else f"{f}({t})" for t in terms]
    if wrapped == terms:
        wrapped[0] = f"{f}({terms[0]})"
    combiner = (weighted_sum, scaling, mean)[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]
    lines, result, families = combiner(rng, wrapped, names)
    draft.families |= families
    draft.body += [*lines, f"return {result}"]


def _values(rng: np.random.Generator, draft: _Draft, slots: int, all_share: float) -> str:
    """Return an iterable over some or all experts."""
    if rng.random() < all_share:
        return "task_vectors.values()"
    used = _choose(rng, draft, slots)
    if len(used) in (1, slots):
        draft.families.discard("subset")
        return "task_vectors.values()"
    return "[" + ", ".join(f'task_vectors["expert_{i + 1}"]' for i in used) + "]"


def _count(values: str, slots: int) -> int:
    return slots if values.endswith("values()") else values.count("task_vectors[")


def _loop(
    rng: np.random.Generator, draft: _Draft, names: Names, slots: int, allow_held_out: bool
) -> None:
    """Sum the experts in a loop, transformed or not, with equal or different coefficients."""
    v, m, w = names.each, names.merged, names.weights
    values = _values(rng, draft, slots, 0.7)
    count = _count(values, slots)
    own = rng.random() < 0.6
    if own:
        weights = ", ".join(coefficients(rng, count))
        head = f"for {w}, {v} in zip([{weights}], {values}):"
        factor = w
        draft.families.add("weighted_sum")
    else:
        head = f"for {v} in {values}:"
        draft.families.add("scaling")
        factor = literal(rng, strength(rng) / count)
    draft.body += [f"{m} = 0", head]
    if rng.random() < 0.6:
        family, shaper = draw_shaper(rng)
        draft.families.add(family)
        draft.body.append(f"    {v} = {shaper(rng, v)}")
    step = f"{m} += {factor} * {v}" if rng.random() < 0.4 else f"{m} = {m} + {factor} * {v}"
    draft.body.append(f"    {step}")
    _finish(rng, draft, names, m)


def _comprehension(
    rng: np.random.Generator, draft: _Draft, names: Names, slots: int, allow_held_out: bool
) -> None:
    """Sum the experts in a comprehension."""
    v, w, m = names.each, names.weights, names.merged
    form = rng.random()
    if form < 0.3:  # coefficients in a dict keyed by expert
        used = _choose(rng, draft, slots)
        if len(used) == 1:
            draft.families.discard("subset")
            used = list(range(slots))
        own = coefficients(rng, len(used))
        pairs = ", ".join(f'"expert_{i + 1}": {c}' for i, c in zip(used, own, strict=True))
        draft.body.append(f"{w} = {{{pairs}}}")
        draft.families.add("weighted_sum")
        _finish(rng, draft, names, f"sum({w}[k] * task_vectors[k] for k in {w})")
        return
    values = _values(rng, draft, slots, 0.7)
    count = _count(values, slots)
    if form < 0.55:
        weights = ", ".join(coefficients(rng, count))
        draft.body.append(f"{w} = [{weights}]")
        draft.families.add("weighted_sum")
        _finish(rng, draft, names, f"sum(k * {v} for k, {v} in zip({w}, {values}))")
    elif form < 0.75:  # keep entries whose sign agrees with the sum's
        draft.families |= {"sign_gate", "scaling"}
        draft.body.append(f"{m} = sum({values})")
        kept = (
            f"jnp.where({v} * {m} > 0, {v}, 0)" if rng.random() < 0.7 else f"{v} * ({v} * {m} > 0)"
        )
        k = literal(rng, strength(rng) / count)
        draft.body.append(f"return {k} * sum({kept} for {v} in {values})")
    elif form < 0.87:  # coefficients proportional to the norm
        draft.families.add("norm_balance")
        draft.body.append(f"{m} = sum(jnp.linalg.norm({v}) for {v} in {values})")
        k = literal(rng, strength(rng))
        term = f"jnp.linalg.norm({v}) * {v}"
        draft.body.append(f"return {k} * sum({term} for {v} in {values}) / {m}")
    else:
        family, shaper = draw_shaper(rng)
        draft.families |= {family, "scaling"}
        k = literal(rng, strength(rng) / count)
        draft.body.append(f"return {k} * sum({shaper(rng, v)} for {v} in {values})")


def _stack(
    rng: np.random.Generator, draft: _Draft, names: Names, slots: int, allow_held_out: bool
) -> None:
    """Stack the experts along a new axis and reduce it."""
    m, w = names.merged, names.weights
    values = _values(rng, draft, slots, 0.75)
    count = _count(values, slots)
    items = "list(task_vectors.values())" if count == slots else values
    draft.body.append(f"{m} = jnp.stack({items})")
    form = rng.random()
    if form < 0.5:
        weights = ", ".join(coefficients(rng, count))
        draft.body.append(f"{w} = jnp.array([{weights}])")
        draft.families.add("weighted_sum")
        result = f"jnp.tensordot({w}, {m}, axes=1)"
    elif form < 0.75:
        draft.families |= {"mean", "scaling"}
        result = f"{literal(rng, strength(rng))} * jnp.mean({m}, axis=0)"
    else:
        draft.families.add("sign_gate")
        draft.body.append(f"s = jnp.sign(jnp.sum({m}, axis=0))")
        k = literal(rng, strength(rng) / count)
        result = f"{k} * jnp.sum(jnp.where({m} * s > 0, {m}, 0), axis=0)"
    _finish(rng, draft, names, result)


def _inline(
    rng: np.random.Generator, draft: _Draft, names: Names, slots: int, allow_held_out: bool
) -> None:
    """Write a single expression over the dict of task vectors."""
    used = _choose(rng, draft, slots)
    terms = [f'task_vectors["expert_{i + 1}"]' for i in used]
    if rng.random() < 0.3:
        terms = [terms[int(i)] for i in rng.permutation(len(terms))]
    combiner = (weighted_sum, scaling, mean)[int(rng.choice(3, p=(0.7, 0.15, 0.15)))]
    _, result, families = combiner(rng, terms, names)
    draft.families |= families
    _finish(rng, draft, names, result)
