"""Stability of stored programs across the supported JAX versions."""

import base64
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

_spec = importlib.util.spec_from_file_location(
    "stored_programs", Path(__file__).with_name("stored_programs.py")
)
stored_programs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stored_programs)

STORED = {path.stem: json.loads(path.read_text()) for path in stored_programs.FILES}
CASES = [(version, name) for version, programs in STORED.items() for name in programs]
# JAX 0.12 traces these to different operations than 0.10.2.
TRACED_DIFFERENTLY = {"top-level arrays", "rows", "log2", "polyval", "derivative of arctanh"}


def test_both_ends_of_the_supported_range_are_stored():
    assert {version.rsplit(".", 1)[0] for version in STORED} >= {"jax-0.10", "jax-0.12.0"}


@pytest.mark.parametrize(("version", "name"), CASES)
def test_stored_program_keeps_its_identity(version, name):
    entry = STORED[version][name]
    program = verify_ir(entry["ir"], stored_programs.SIGNATURE)
    assert program.identity == entry["identity"]
    assert program.structure == entry["structure"]


@pytest.mark.parametrize(("version", "name"), CASES)
def test_stored_program_keeps_its_result(version, name):
    entry = STORED[version][name]
    data = base64.b64decode(entry["result"])
    expected = np.frombuffer(data, np.float32).reshape(stored_programs.SHAPE)
    result = stored_programs.result_of(entry["ir"])
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", stored_programs.PROGRAMS)
def test_source_is_traced_to_the_stored_program(name):
    running = f"jax-{jax.__version__}"
    comparable = [v for v in STORED if v == running or name not in TRACED_DIFFERENTLY]
    if not comparable:
        pytest.skip(f"no stored programs of {running}; stored_programs.py writes them")
    traced = trace_trusted(stored_programs.PROGRAMS[name], stored_programs.SIGNATURE)
    for version in comparable:
        assert traced == STORED[version][name]["ir"], version
