"""A grammar that samples random merge programs in the algorithm API.

The zoo's seed is trained on these programs, so they are short (60 to 120 tokens), use few naming
schemes, and vary in structure, operations and constants. Almost half of them gate single experts by
depth or by kind. All constants are tunable. Some programs are broken on purpose, because a search
needs a generator that can fail. The families in `sdjax.programs.families.HELD_OUT` are excluded by
default; they show whether a trained generator goes beyond its training programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdjax.programs.grammar_combiners import draw_combiner, mean, scaling, weighted_sum
from sdjax.programs.grammar_draft import CANONICAL, Draft, Loading, Piece
from sdjax.programs.grammar_faults import break_source
from sdjax.programs.grammar_gates import DEPTH, KIND, draw_factor, draw_gate, kind_gate
from sdjax.programs.grammar_pieces import (
    SCHEME_SHARES,
    SCHEMES,
    coefficients,
    draw_shaper,
    linear,
    literal,
    number,
    strength,
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


def sample_candidate(
    rng: np.random.Generator, *, slots: int = 3, allow_held_out: bool = False
) -> RandomCandidate:
    """Sample the source of a random merge program, broken in a tenth of the cases.

    Args:
        rng: random generator.
        slots: number of experts, 2 to 5.
        allow_held_out: whether to use the held-out families, in about a third of the candidates.
    """
    draft = sample_draft(rng, slots=slots, allow_held_out=allow_held_out)
    text = draft.text()
    if rng.random() < FAULT_SHARE:
        text = break_source(rng, text, slots)
        return RandomCandidate(text=text, families=frozenset(), fails=True)
    return RandomCandidate(text=text, families=draft.families, fails=False)


def sample_draft(
    rng: np.random.Generator, *, slots: int = 3, allow_held_out: bool = False
) -> Draft:
    """Sample a random merge program that is not broken; see `sample_candidate`."""
    if not MIN_SLOTS <= slots <= MAX_SLOTS:
        raise ValueError(f"slots must be between {MIN_SLOTS} and {MAX_SLOTS}, not {slots}")
    structures = (_lines, _helper, _loop, _comprehension, _stack, _inline)
    while True:
        structure = structures[int(rng.choice(6, p=(0.58, 0.12, 0.1, 0.1, 0.04, 0.06)))]
        draft = structure(rng, slots, allow_held_out)
        if fits(draft):
            return draft


def fits(draft: Draft) -> bool:
    """Return whether a program's length is within the limits of the grammar."""
    return MIN_LENGTH <= len(draft.text()) <= MAX_LENGTH + 30 * (draft.slots - 3)


def _draft(
    rng: np.random.Generator,
    slots: int,
    core: Piece,
    steps: tuple[Piece, ...] = (),
    finish: Piece | None = None,
) -> Draft:
    """Return a draft with a random naming scheme and way to load the experts."""
    names = SCHEMES[int(rng.choice(len(SCHEMES), p=SCHEME_SHARES))]
    loadings: tuple[Loading, ...] = ("unpack", "items", "alias")
    loading = loadings[int(rng.choice(3, p=(0.45, 0.4, 0.15)))]
    return Draft(names=names, slots=slots, loading=loading, steps=steps, core=core, finish=finish)


def choose_experts(rng: np.random.Generator, slots: int) -> list[int]:
    """Sample the experts that a program uses; return them in slot order."""
    draw = rng.random()
    count = slots if draw < 0.62 else slots - 1 if draw < 0.95 or slots == 2 else 1
    return sorted(int(i) for i in rng.choice(slots, size=count, replace=False))


def gate_step(rng: np.random.Generator, expert: int) -> Piece:
    """Return a step that gates an expert by depth, by kind or by both."""
    lines, families = draw_gate(rng, CANONICAL.experts[expert])
    return Piece(lines=tuple(lines), families=families)


def shaper_step(rng: np.random.Generator, expert: int) -> Piece:
    """Return a step that transforms the entries of an expert."""
    v = CANONICAL.experts[expert]
    family, shaper = draw_shaper(rng)
    return Piece(lines=(f"{v} = {shaper(rng, v)}",), families=frozenset({family}))


def combiner_core(
    rng: np.random.Generator, experts: list[int], *, allow_held_out: bool = False
) -> Piece:
    """Return a core that combines some of the experts by a random combiner."""
    terms = [CANONICAL.experts[i] for i in experts]
    lines, result, families = draw_combiner(rng, allow_held_out)(rng, terms, CANONICAL)
    return Piece(lines=tuple(lines), result=result, families=frozenset(families - {"subset"}))


def linear_core(rng: np.random.Generator, experts: list[int]) -> Piece:
    """Return a core that adds some of the experts."""
    terms = [CANONICAL.experts[i] for i in experts]
    combiner = (weighted_sum, scaling)[int(rng.choice(2, p=(0.7, 0.3)))]
    lines, result, families = combiner(rng, terms, CANONICAL)
    return Piece(lines=tuple(lines), result=result, families=frozenset(families))


def random_finish(rng: np.random.Generator) -> Piece:
    """Return a last operation on the result."""
    m, draw = CANONICAL.merged, rng.random()
    if draw < 0.3:
        return Piece(result=f"{draw_factor(rng)} * {m}", families=frozenset({DEPTH}))
    if draw < 0.45:
        lines = tuple(kind_gate(rng, m))
        return Piece(lines=lines, result=m, families=frozenset({KIND}))
    if draw < 0.7:
        return _base_relative(rng, m)
    family, shaper = draw_shaper(rng)
    return Piece(result=shaper(rng, m), families=frozenset({family}))


def _sometimes_finish(rng: np.random.Generator, share: float = 0.3) -> Piece | None:
    return random_finish(rng) if rng.random() < share else None


def _base_relative(rng: np.random.Generator, m: str) -> Piece:
    form = rng.random()
    families = {"base_relative"}
    if form < 0.3:
        low = number(rng, 0.1, 0.7)
        result = f"jnp.where({m} * base > 0, {m}, {low} * {m})"
    elif form < 0.55:
        k, low = number(rng, 0.2, 1.5), number(rng, 0.1, 0.7)
        result = f"jnp.where(jnp.abs(base) > {k} * jnp.std(base), {m}, {low} * {m})"
    elif form < 0.8:
        k = number(rng, 0.1, 0.8)
        families.add("clip")
        result = f"jnp.clip({m}, -{k} * jnp.std(base), {k} * jnp.std(base))"
    else:
        result = f"{number(rng, 0.1, 0.6)} * {m} * jnp.std(base) / jnp.std({m})"
    return Piece(result=result, families=frozenset(families))


def _lines(rng: np.random.Generator, slots: int, allow_held_out: bool) -> Draft:
    """Write statements that load the experts, gate or transform them, and combine them."""
    experts = choose_experts(rng, slots)
    gates = int(rng.choice(4, p=(0.3, 0.37, 0.25, 0.08)))
    shapers = int(rng.choice(3, p=(0.58, 0.34, 0.08) if gates == 0 else (0.82, 0.16, 0.02)))
    if gates == shapers == 0 and len(experts) > 1 and rng.random() < 0.1:
        return _draft(rng, slots, _depth_blend(rng, experts))
    core = combiner_core(rng, experts, allow_held_out=allow_held_out)
    steps = []
    for expert in sorted(
        rng.choice(core.experts, size=min(shapers, len(core.experts)), replace=False)
    ):
        steps.append(shaper_step(rng, int(expert)))
    gated = [*rng.permutation(core.experts)][:gates]
    if gates > 1 and rng.random() < 0.25:  # two gates of one expert
        gated = [gated[0], *gated][:gates]
    steps += [gate_step(rng, int(expert)) for expert in sorted(gated)]
    share = 0.36 if gates == 0 else 0.1
    return _draft(rng, slots, core, tuple(steps), _sometimes_finish(rng, share))


def _depth_blend(rng: np.random.Generator, experts: list[int]) -> Piece:
    """Use one expert in early layers and another in late layers."""
    order = [CANONICAL.experts[experts[int(i)]] for i in rng.permutation(len(experts))]
    k = coefficients(rng, len(order))
    parts = [f"depth * {order[0]}", f"(1 - depth) * {order[1]}", *order[2:]]
    return Piece(result=linear(k, parts), families=frozenset({DEPTH}))


def _helper(rng: np.random.Generator, slots: int, allow_held_out: bool) -> Draft:
    """Apply a helper function to some or all experts."""
    family, shaper = draw_shaper(rng)
    v, f = CANONICAL.each, CANONICAL.helper
    if rng.random() < 0.25:
        helper = f"{f} = lambda {v}: {shaper(rng, v)}"
    else:
        helper = f"def {f}({v}):\n    return {shaper(rng, v)}"
    experts = choose_experts(rng, slots)
    terms = [CANONICAL.experts[i] for i in experts]
    wrapped = [t if rng.random() < 0.3 else f"{f}({t})" for t in terms]
    if wrapped == terms:
        wrapped[0] = f"{f}({terms[0]})"
    combiner = (weighted_sum, scaling, mean)[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]
    lines, result, families = combiner(rng, wrapped, CANONICAL)
    core = Piece(
        helpers=(helper,),
        lines=tuple(lines),
        result=result,
        families=frozenset(families | {family}),
    )
    gated = rng.permutation(experts)[: int(rng.choice(2, p=(0.55, 0.45)))]
    return _draft(rng, slots, core, tuple(gate_step(rng, int(expert)) for expert in gated))


def _values(rng: np.random.Generator, slots: int, all_share: float) -> tuple[str, int, set[str]]:
    """Return an iterable over some or all experts, their number, and the families of that."""
    experts = choose_experts(rng, slots) if rng.random() >= all_share else []
    if len(experts) in (0, 1, slots):
        return "task_vectors.values()", slots, set()
    items = ", ".join(f'task_vectors["expert_{i + 1}"]' for i in experts)
    return f"[{items}]", len(experts), {"subset"}


def _loop(rng: np.random.Generator, slots: int, allow_held_out: bool) -> Draft:
    """Sum the experts in a loop, transformed or not, with equal or different coefficients."""
    v, m, w = CANONICAL.each, CANONICAL.merged, CANONICAL.weights
    values, count, families = _values(rng, slots, 0.7)
    if rng.random() < 0.6:
        weights = ", ".join(coefficients(rng, count))
        head = f"for {w}, {v} in zip([{weights}], {values}):"
        factor = w
        families.add("weighted_sum")
    else:
        head = f"for {v} in {values}:"
        families.add("scaling")
        factor = literal(rng, strength(rng) / count)
    lines = [f"{m} = 0", head]
    if rng.random() < 0.6:
        family, shaper = draw_shaper(rng)
        families.add(family)
        lines.append(f"    {v} = {shaper(rng, v)}")
    step = f"{m} += {factor} * {v}" if rng.random() < 0.4 else f"{m} = {m} + {factor} * {v}"
    lines.append(f"    {step}")
    core = Piece(lines=tuple(lines), result=m, families=frozenset(families))
    return _draft(rng, slots, core, finish=_sometimes_finish(rng))


def _comprehension(rng: np.random.Generator, slots: int, allow_held_out: bool) -> Draft:
    """Sum the experts in a comprehension."""
    v, w, m = CANONICAL.each, CANONICAL.weights, CANONICAL.merged
    form = rng.random()
    if form < 0.25:  # coefficients in a dict keyed by expert
        core = _keyed_sum(rng, slots)
        return _draft(rng, slots, core, finish=_sometimes_finish(rng))
    values, count, families = _values(rng, slots, 0.7)
    scale = literal(rng, strength(rng) / count)
    if form < 0.6:
        weights = coefficients(rng, count)
        families.add("weighted_sum")
        if rng.random() < 0.5:  # gates in the list of coefficients
            for i in rng.permutation(count)[: int(rng.integers(1, 3))]:
                weights[i] = draw_factor(rng)
                families.add(DEPTH)
        lines = [f"{w} = [{', '.join(weights)}]"]
        result = f"sum(k * {v} for k, {v} in zip({w}, {values}))"
        core = Piece(lines=tuple(lines), result=result, families=frozenset(families))
        return _draft(rng, slots, core, finish=_sometimes_finish(rng))
    lines = []
    if form < 0.77:  # keep entries whose sign agrees with the sum's
        families |= {"sign_gate", "scaling"}
        lines.append(f"{m} = sum({values})")
        kept = (
            f"jnp.where({v} * {m} > 0, {v}, 0)" if rng.random() < 0.7 else f"{v} * ({v} * {m} > 0)"
        )
        result = f"{scale} * sum({kept} for {v} in {values})"
    elif form < 0.88:  # coefficients proportional to the norm
        families.add("norm_balance")
        lines.append(f"{m} = sum(jnp.linalg.norm({v}) for {v} in {values})")
        k = literal(rng, strength(rng))
        result = f"{k} * sum(jnp.linalg.norm({v}) * {v} for {v} in {values}) / {m}"
    else:
        family, shaper = draw_shaper(rng)
        families |= {family, "scaling"}
        result = f"{scale} * sum({shaper(rng, v)} for {v} in {values})"
    return _draft(
        rng, slots, Piece(lines=tuple(lines), result=result, families=frozenset(families))
    )


def _keyed_sum(rng: np.random.Generator, slots: int) -> Piece:
    """Return a core that adds experts with coefficients in a dict."""
    w = CANONICAL.weights
    experts = choose_experts(rng, slots)
    if len(experts) == 1:
        experts = list(range(slots))
    own = coefficients(rng, len(experts))
    pairs = ", ".join(f'"expert_{i + 1}": {c}' for i, c in zip(experts, own, strict=True))
    families = {"weighted_sum"} | ({"subset"} if len(experts) < slots else set())
    result = f"sum({w}[k] * task_vectors[k] for k in {w})"
    return Piece(lines=(f"{w} = {{{pairs}}}",), result=result, families=frozenset(families))


def _stack(rng: np.random.Generator, slots: int, allow_held_out: bool) -> Draft:
    """Stack the experts along a new axis and reduce it."""
    m, w = CANONICAL.merged, CANONICAL.weights
    values, count, families = _values(rng, slots, 0.75)
    items = "list(task_vectors.values())" if count == slots else values
    lines = [f"{m} = jnp.stack({items})"]
    form = rng.random()
    if form < 0.5:
        lines.append(f"{w} = jnp.array([{', '.join(coefficients(rng, count))}])")
        families.add("weighted_sum")
        result = f"jnp.tensordot({w}, {m}, axes=1)"
    elif form < 0.75:
        families |= {"mean", "scaling"}
        result = f"{literal(rng, strength(rng))} * jnp.mean({m}, axis=0)"
    else:
        families.add("sign_gate")
        lines.append(f"s = jnp.sign(jnp.sum({m}, axis=0))")
        k = literal(rng, strength(rng) / count)
        result = f"{k} * jnp.sum(jnp.where({m} * s > 0, {m}, 0), axis=0)"
    core = Piece(lines=tuple(lines), result=result, families=frozenset(families))
    return _draft(rng, slots, core, finish=_sometimes_finish(rng))


def _inline(rng: np.random.Generator, slots: int, allow_held_out: bool) -> Draft:
    """Write a single expression over the dict of task vectors."""
    experts = choose_experts(rng, slots)
    terms = [f'task_vectors["expert_{i + 1}"]' for i in experts]
    if rng.random() < 0.3:
        terms = [terms[int(i)] for i in rng.permutation(len(terms))]
    combiner = (weighted_sum, scaling, mean)[int(rng.choice(3, p=(0.7, 0.15, 0.15)))]
    _, result, found = combiner(rng, terms, CANONICAL)
    families = found | ({"subset"} if len(experts) < slots else set())
    core = Piece(result=result, families=frozenset(families))
    return _draft(rng, slots, core, finish=_sometimes_finish(rng))
