"""Families of arbitrary verified programs."""

import runpy
from pathlib import Path

import jax
import pytest

from sdjax.programs.families import FAMILIES
from sdjax.programs.family_rules import FamilyReader

CASES = runpy.run_path(str(Path(__file__).parents[1] / "sandbox" / "primitive_cases.py"))["CASES"]


@pytest.mark.parametrize("name", CASES)
def test_reader_accepts_every_allowed_primitive(name):
    function, arguments = CASES[name]
    jaxpr = jax.make_jaxpr(function)(*arguments)
    reader = FamilyReader()
    inputs = [
        reader.atom(frozenset({f"expert_{n + 1}"}), scalar=aval.size == 1)
        for n, aval in enumerate(jaxpr.in_avals)
    ]
    outputs = reader.run(jaxpr.jaxpr, jaxpr.consts, inputs)
    reader.finish(outputs)
    assert len(outputs) == len(jaxpr.out_avals)
    assert reader.found <= FAMILIES.keys()


def test_interpretation_of_nested_loops_is_bounded():
    def nested(x, depth):
        if depth == 0:
            return 0.5 * x
        return jax.lax.fori_loop(0, 3, lambda _, y: nested(y, depth - 1), x)

    jaxpr = jax.make_jaxpr(lambda x: nested(x, 20))(jax.numpy.ones((8, 6)))
    reader = FamilyReader()
    reader.finish(reader.run(jaxpr.jaxpr, jaxpr.consts, [reader.atom(frozenset({"expert_1"}))]))
    assert reader.used == {"expert_1"}
