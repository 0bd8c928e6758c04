"""Families of operations in merge programs, determined from their verified IR."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from sdjax.programs.family_rules import FamilyReader
from sdjax.sandbox.ir.calling_convention import CallingConvention
from sdjax.sandbox.ir.decode import Block
from sdjax.sandbox.verify.interpreter import run_block
from sdjax.sandbox.verify.verified_program import VerifiedProgram

FAMILIES: dict[str, str] = {
    "weighted_sum": "a sum of experts with different constant coefficients",
    "subset": "the result does not depend on every expert",
    "mean": "a sum of experts, divided by their number",
    "scaling": "a sum of experts, all times the same constant",
    "interpolation": "a sum of experts with separate coefficients that sum to one",
    "norm_balance": "experts that are added after being scaled by norms or spreads",
    "sign_gate": "entries selected by their sign or by the agreement of signs",
    "magnitude_trim": "entries selected by a threshold on their magnitude",
    "clip": "entries limited to a range",
    "row_mean": "reductions over rows or columns",
    "saturation": "tanh",
    "sign_only": "signs times one magnitude",
    "center": "a tensor minus its mean",
    "soft_gate": "an exponential or sigmoid of entries",
    "power": "entries times their own magnitude",
    "extremes": "the elementwise larger or smaller of two experts",
    "cosine_weight": "a tensor scaled by a dot product of two experts",
    "depth_ramp": "the layer's depth",
    "kind_gate": "another operation for some kinds of tensors",
    "base_relative": "the seed's tensor",
    "max_magnitude": "the larger of two magnitudes, elementwise (held out of training)",
    "projection_removal": "a tensor minus its projection onto an expert (held out of training)",
}
_SHORT = 6  # characters of a number that someone wrote, such as -0.125

HELD_OUT: frozenset[str] = frozenset({"max_magnitude", "projection_removal"})


def families_of(program: VerifiedProgram) -> frozenset[str]:
    """Return the families of a verified program, a subset of `FAMILIES`."""
    found: set[str] = set()
    slots: set[str] = set()
    used: set[str] = set()
    operations: set[Hashable] = set()
    for convention, block in program.programs.values():
        reader = FamilyReader()
        count, leaves = len(convention.slots), convention.num_leaves
        slots |= set(convention.slots)
        names = [slot for slot in (*convention.slots, "base") for _ in range(leaves)]
        names += ["", "depth"]  # the PRNG key is not an operand of any family
        names += [""] * len(program.hyperparameters)
        jaxpr = _traced(program, convention, block)
        inputs = [
            reader.atom(frozenset({name} - {""}), scalar=n >= (count + 1) * leaves)
            for n, name in enumerate(names)
        ]
        reader.finish(reader.run(jaxpr.jaxpr, jaxpr.consts, inputs))
        found |= reader.found
        used |= reader.used
        operations.add((frozenset(reader.found), frozenset(reader.used), _decimals(jaxpr.jaxpr)))
    if not slots <= used:
        found.add("subset")
    if "base" in used:
        found.add("base_relative")
    if "depth" in used:
        found.add("depth_ramp")
    # The kind is not requested where the shape tells it; then the operations or numbers differ.
    if "kind" in program.requests or len(operations) > 1:
        found.add("kind_gate")
    return frozenset(found)


def _traced(program: VerifiedProgram, convention: CallingConvention, block: Block) -> Any:
    limit = program.max_loop_iterations
    arguments = convention.avals(list(program.hyperparameters))
    return jax.make_jaxpr(lambda *inputs: run_block(block, inputs, limit)[0])(*arguments)


def _decimals(jaxpr: Any) -> frozenset[str]:
    """Return the short decimal fractions in a jaxpr; those do not come from shapes."""
    found: set[str] = set()
    for equation in jaxpr.eqns:
        for atom in equation.invars:
            if isinstance(atom, Literal) and np.size(atom.val) == 1:
                text = str(np.asarray(atom.val).reshape(()))
                if "." in text and not text.endswith(".0") and len(text) <= _SHORT:
                    found.add(text)
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns"):
                    found |= _decimals(body)
    return frozenset(found)
