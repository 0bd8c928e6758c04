"""Families of operations in merge programs, determined from their verified IR."""

from __future__ import annotations

from typing import Any

import jax

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
    "base_relative": "the seed's tensor",
    "max_magnitude": "the larger of two magnitudes, elementwise (held out of training)",
    "projection_removal": "a tensor minus its projection onto an expert (held out of training)",
}
HELD_OUT: frozenset[str] = frozenset({"max_magnitude", "projection_removal"})


def families_of(program: VerifiedProgram) -> frozenset[str]:
    """Return the families of a verified program, a subset of `FAMILIES`."""
    reader = FamilyReader()
    slots: set[str] = set()
    for convention, block in program.programs.values():
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
    if not slots <= reader.used:
        reader.found.add("subset")
    if "base" in reader.used:
        reader.found.add("base_relative")
    if "depth" in reader.used:
        reader.found.add("depth_ramp")
    return frozenset(reader.found)


def _traced(program: VerifiedProgram, convention: CallingConvention, block: Block) -> Any:
    limit = program.max_loop_iterations
    arguments = convention.avals(list(program.hyperparameters))
    return jax.make_jaxpr(lambda *inputs: run_block(block, inputs, limit)[0])(*arguments)
