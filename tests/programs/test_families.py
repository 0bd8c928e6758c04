"""Families of arbitrary verified programs."""

import json
import runpy
from pathlib import Path

import jax
import pytest

from sdjax.programs.families import FAMILIES, families_of
from sdjax.programs.family_rules import FamilyReader
from sdjax.sandbox.verify.verified_program import verify_ir

SANDBOX_TESTS = Path(__file__).parents[1] / "sandbox"
CASES = runpy.run_path(str(SANDBOX_TESTS / "primitive_cases.py"))["CASES"]
STORED = runpy.run_path(str(SANDBOX_TESTS / "ir" / "stored_programs.py"))
# The families of the stored programs, the same for all JAX versions that wrote or read them.
STORED_FAMILIES = json.loads(Path(__file__).with_name("stored_families.json").read_text())


@pytest.mark.parametrize("path", STORED["FILES"], ids=lambda path: path.stem)
def test_families_do_not_depend_on_the_jax_version(path):
    programs = {name: entry["ir"] for name, entry in json.loads(path.read_text()).items()}
    families = {
        name: sorted(families_of(verify_ir(ir, STORED["SIGNATURE"])))
        for name, ir in programs.items()
    }
    assert families == STORED_FAMILIES


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
