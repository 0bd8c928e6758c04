"""Bit-exact agreement of every allowed primitive, encoded and decoded, with `jax.jit`."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from primitive_cases import CASES

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.decode import _constants, _Decoder
from sdjax.sandbox.ir.encode import Encoder, encode_number
from sdjax.sandbox.ir.parameters import decode_number
from sdjax.sandbox.ir.primitives import ALLOWED, CONTROL_FLOW
from sdjax.sandbox.signature import MergeSignature, TensorSignature
from sdjax.sandbox.verify.interpreter import run_block

SIGNATURE = MergeSignature(
    slots=("expert_1",), tensors=(TensorSignature(kind="mlp", shape=(6, 4)),)
)


def _through_json(function, arguments):
    """Return the names of the primitives in the IR, and the decoded function."""
    encoder = Encoder(Limits())
    closed = jax.make_jaxpr(lambda *xs: tuple(function(*xs)))(*arguments)
    block, constants = json.loads(json.dumps([encoder.block(closed), encoder.constants]))
    decoder = _Decoder(SIGNATURE)
    decoder.constants = _constants(constants, Limits())
    decoded = decoder.block(block, len(arguments), None, 0)
    return set(_names(block)), lambda *xs: run_block(decoded, xs, 128)


def _names(block):
    for name, _, _, params in block["equations"]:
        yield name
        for value in (*params.values(), *params.get("branches", ())):
            if isinstance(value, dict) and "equations" in value:
                yield from _names(value)


@pytest.mark.parametrize("name", CASES)
def test_verified_program_equals_jit_bit_for_bit(name):
    function, arguments = CASES[name]
    _, decoded = _through_json(function, arguments)
    outputs, exhausted = jax.jit(decoded)(*arguments)
    assert exhausted is None or not exhausted
    expected = jax.jit(function)(*arguments)
    assert len(outputs) == len(expected)
    for found, reference in zip(outputs, expected, strict=True):
        assert found.dtype == reference.dtype
        assert np.array_equal(_bits(found), _bits(reference))


_FAST = ("complex", "reductions", "calls")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _FAST else pytest.mark.slow) for n in CASES]
)
def test_verified_program_is_differentiable_where_jax_is(name):
    function, arguments = CASES[name]
    _, decoded = _through_json(function, arguments)
    assert _differentiable(lambda *xs: decoded(*xs)[0], arguments) == _differentiable(
        function, arguments
    )


def _differentiable(function, arguments):
    """Return, for each result, whether JAX can differentiate it in the first argument."""
    count = len(jax.eval_shape(lambda *xs: tuple(function(*xs)), *arguments))
    found = []
    for i in range(count):

        def total(x, i=i):
            return jnp.sum(jnp.real(function(x, *arguments[1:])[i]))

        try:
            jax.eval_shape(jax.grad(total), arguments[0])
            found.append(True)
        except (NotImplementedError, TypeError, ValueError):
            found.append(False)
    return found


def test_cases_cover_every_primitive_of_this_jax():
    covered = set().union(*(_through_json(*case)[0] for case in CASES.values()))
    assert covered == {*(name for name, entry in ALLOWED.items() if entry.native), *CONTROL_FLOW}


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("log2", [0.5, 4.0], lambda x: np.log2(x)),
        ("one_minus_square", [0.5, 0.9], lambda x: 1 - x * x),
        ("polynomial", [0.5, -2.0], lambda x: 1 - 2 * x + 3 * x**2),
    ],
)
def test_newer_primitives_run_on_every_supported_jax(name, operands, expected):
    x = jnp.asarray(operands, jnp.float32)
    coefficients = [jnp.float32(c) for c in (1, -2, 3)] if name == "polynomial" else []
    result = ALLOWED[name].bind(x, *coefficients)
    np.testing.assert_allclose(result, expected(np.asarray(x)), rtol=1e-6)


# Builds the table without some of the names of JAX that it looks up, and then without any of them.
_WITHOUT_NAMES = """
import importlib, inspect, re
import jax
from jax.extend.core import primitives as jax_primitives
from sdjax.sandbox.ir import parameters, primitives

NEEDED = ("erfc", "top_k", "scatter_sub", "FftType", "RoundingMethod")
quoted = {*re.findall(r'"(\\w+)"', inspect.getsource(primitives)), "Precision"}
names = [name for name in dir(jax.lax) if name in quoted or name.endswith("_p")]
assert set(names) >= set(NEEDED)
names += [name for name in dir(jax_primitives) if name.endswith("_p")]
listed = list(primitives.ALLOWED)
for removed in (*(names[start::12] for start in range(12)), names):
    kept = []
    for home in (jax.lax, jax_primitives):
        for name in removed:
            if hasattr(home, name):
                kept.append((home, name, getattr(home, name)))
                delattr(home, name)
    importlib.reload(parameters)
    table = importlib.reload(primitives).ALLOWED
    assert list(table) == listed
    assert all(table[name].bind is None for name in {"erfc", "top_k"} & set(removed))
    for home, name, value in kept:
        setattr(home, name, value)
"""


def test_table_is_built_without_any_name_of_jax():
    subprocess.run([sys.executable, "-c", _WITHOUT_NAMES], check=True, timeout=120)


def _bits(array):
    array = np.asarray(array)
    return np.frombuffer(array.tobytes(), np.uint8)


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-45, 3.4e38, np.inf, -np.inf, np.nan])
def test_scalars_are_encoded_exactly(value):
    scalar = np.float32(value)
    back = decode_number(
        json.loads(json.dumps(encode_number(scalar), allow_nan=False)), scalar.dtype
    )
    assert back.tobytes() == scalar.tobytes()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, "float32"),
        ("1", "float32"),
        (1.0, "int32"),
        (True, "int32"),
        (2**31, "int32"),
        (1, "bool"),
        (None, "float32"),
        ([1], "complex64"),
    ],
)
def test_scalars_of_another_type_raise_value_error(value, dtype):
    with pytest.raises(ValueError, match=r"expected|range"):
        decode_number(value, np.dtype(dtype))
