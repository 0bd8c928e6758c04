"""The decoder on forged and malformed IR."""

import copy
import dataclasses
import json

import pytest
from catalogue import VALID, merge

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.hashes import canonical
from sdjax.sandbox.ir.primitives import ALLOWED
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

LOOPS = ("scan", "while", "cond", "fori loop")


@pytest.fixture(scope="module")
def irs(signature):
    return {
        name: trace_trusted(VALID[name], signature) for name in ("ties", *LOOPS, "top-level arrays")
    }


def first_block(message):
    return message["programs"][0]["block"]


def refused(message, signature) -> Refusal:
    ir = message if isinstance(message, str) else canonical(message)
    with pytest.raises(Refusal) as refusal:
        verify_ir(ir, signature)
    assert refusal.value.message
    return refusal.value


@pytest.mark.parametrize(
    "ir",
    [
        "",
        "null",
        "[]",
        "{}",
        "NaN",
        '{"version": 1',
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 10_000,
        "\0",
        "\ud800",
        "x" * (5 << 20),
    ],
)
def test_malformed_text_is_refused(ir, signature):
    assert refused(ir, signature).rule == "ir"


def _set(path, value):
    def change(message):
        *parents, last = path
        for key in parents:
            message = message[key]
        message[last] = value

    return change


BLOCK = ("programs", 0, "block")
FIRST = (*BLOCK, "equations", 0)
HOSTILE = {
    "another version": _set(("version",), 2),
    "version true": _set(("version",), True),
    "another form": _set(("form",), "module"),
    "a tree's form": _set(("form",), "tree"),
    "no programs": _set(("programs",), []),
    "a missing shape": lambda m: m["programs"].pop(),
    "a shape twice": lambda m: m["programs"].append(m["programs"][0]),
    "another shape": _set(("programs", 0, "of"), [None, [5, 5]]),
    "an unknown kind": _set(("programs", 0, "of"), ["mlp.evil", [8, 16]]),
    "an unhashable name": _set(("programs", 0, "of"), [None, [[8], 16]]),
    "an extra field": lambda m: m.update(extra=1),
    "a hyperparameter with an invalid name": _set(("hyperparameters",), {"a b": 1.0}),
    "a hyperparameter that is text": _set(("hyperparameters",), {"a": "1"}),
    "more inputs": _set((*BLOCK, "inputs"), 7),
    "inputs true": _set((*BLOCK, "inputs"), True),
    "an unknown primitive": _set((*FIRST, 0), "pure_callback"),
    "a dunder primitive": _set((*FIRST, 0), "__class__"),
    "a primitive that is a list": _set((*FIRST, 0), ["add"]),
    "a custom call": _set((*FIRST, 0), "ffi_call"),
    "too few operands": _set((*FIRST, 1), []),
    "too many operands": _set((*FIRST, 1), [0] * 300),
    "an operand of another shape": _set((*BLOCK, "equations", 1, 1), [0, 1, 2, 3]),
    "an undefined variable": _set((*FIRST, 1), [10_000]),
    "a variable used before its definition": _set((*FIRST, 1), [6]),
    "a negative variable": _set((*FIRST, 1), [-1]),
    "a fractional variable": _set((*FIRST, 1), [0.0]),
    "a true variable": _set((*FIRST, 1), [True]),
    "a literal of an unknown type": _set((*FIRST, 1), [["object", 1]]),
    "a literal that is text": _set((*FIRST, 1), [["float32", "1e5"]]),
    "a literal out of range": _set((*FIRST, 1), [["int8", 1000]]),
    "a missing constant": _set((*FIRST, 1), [["constant", 5]]),
    "another number of results": _set((*FIRST, 2), 2),
    "no results": _set((*FIRST, 2), 0),
    "a huge number of results": _set((*FIRST, 2), 10**30),
    "an extra parameter": _set((*FIRST, 3), {"effects": 1}),
    "parameters that are a list": _set((*FIRST, 3), []),
    "a short equation": _set(FIRST, ["abs", [0], 1]),
    "no outputs": _set((*BLOCK, "outputs"), []),
    "an output of another shape": _set((*BLOCK, "outputs"), [["float32", 0.0]]),
    "the key as the output": _set((*BLOCK, "outputs"), [4]),
    "a nested block as a parameter": lambda m: m["programs"][0]["block"]["equations"][0][3].update(
        body=first_block(copy.deepcopy(m))
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused(name, irs, signature):
    message = json.loads(irs["ties"])
    HOSTILE[name](message)
    assert refused(message, signature).verdict in ("refused", "wrong signature")


@pytest.mark.parametrize(
    "constant",
    [
        {"type": "float32", "shape": [3], "data": "AAAA"},
        {"type": "float32", "shape": [3], "data": "@@@@"},
        {"type": "object", "shape": [1], "data": "AAAAAAAAAAA="},
        {"type": "float32", "shape": [-1], "data": ""},
        {"type": "float32", "shape": [1 << 40, 1 << 40], "data": ""},
        {"type": "bool", "shape": [1], "data": "Ag=="},
        {"type": "float32", "shape": [1 << 19], "data": "AAAA" * (1 << 19)},
        {"type": "float32", "shape": [1] * 9, "data": "AAAAAA=="},
    ],
)
def test_hostile_constants_are_refused(constant, irs, signature):
    message = json.loads(irs["top-level arrays"])
    message["constants"][0] = constant
    assert refused(message, signature).rule == "ir"


def _scan_of(message):
    return next(e for e in first_block(message)["equations"] if e[0] == "scan")[3]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"length": 10**12}, "loop-iterations"),
        ({"length": -1}, "ir"),
        ({"length": 10**30}, "ir"),
        ({"carry": 5}, "ir"),
        ({"consts": 99}, "ir"),
        ({"reverse": 1}, "ir"),
        ({"body": None}, "ir"),
    ],
)
def test_hostile_loops_are_refused(change, rule, irs, signature):
    message = json.loads(irs["fori loop"])
    for program in message["programs"]:
        next(e for e in program["block"]["equations"] if e[0] == "scan")[3].update(change)
    assert refused(message, signature).rule == rule


def test_nesting_is_bounded(signature):
    block = {"inputs": 1, "equations": [], "outputs": [0]}
    for _ in range(20):
        block = {
            "inputs": 1,
            "equations": [["cond", [["int32", 0], 0], 1, {"branches": [block]}]],
            "outputs": [1],
        }
    ir = trace_trusted(merge("return task_vectors['expert_1']"), signature)
    message = json.loads(ir)
    message["programs"][0]["block"]["equations"] = [
        ["cond", [["int32", 0], 0], 1, {"branches": [block]}]
    ]
    message["programs"][0]["block"]["outputs"] = [6]
    assert "nesting" in refused(message, signature).message


def test_condition_with_a_loop_is_refused(irs, signature):
    """Check nested conditions: each is traced twice, so 8 levels would take 256 times as long."""
    message = json.loads(irs["while"])
    for program in message["programs"]:
        loop = next(e for e in program["block"]["equations"] if e[0] == "while")
        inner = [loop[0], [0], 1, copy.deepcopy(loop[3])]
        loop[3]["condition"]["equations"].insert(0, inner)
    assert "condition" in refused(message, signature).message


def test_equation_limit_covers_all_blocks(signature):
    ir = trace_trusted(VALID["ties"], signature)
    tight = MergeSignature(
        slots=signature.slots, tensors=signature.tensors, limits=Limits(equations=40)
    )
    assert "equations" in refused(ir, tight).message


def test_huge_arrays_are_refused_before_they_are_computed(signature):
    message = json.loads(
        trace_trusted(merge("return task_vectors['expert_1'] + jnp.zeros(1)[0]"), signature)
    )
    for program in message["programs"]:
        program["block"]["equations"].insert(
            0, ["iota", [], 1, {"dtype": "float32", "shape": [1 << 39], "dimension": 0}]
        )
    assert refused(message, signature).rule in ("elements", "ir")


def test_ir_that_is_not_canonical_is_refused(irs, signature):
    """Check that one program cannot have several hashes."""
    ir = irs["ties"]
    assert verify_ir(ir, signature)
    for variant in (
        ir + " ",
        ir.replace('"version":1', '"version":1,"version":1'),
        ir.replace('"version":1', '"version":2,"version":1'),
        ir.replace('"float32"', '"float\\u00332"'),
        ir.replace("0.699999988079071", "0.6999999880790710"),
        json.dumps(json.loads(ir)),
    ):
        assert variant != ir
        assert "canonical" in refused(variant, signature).message


@pytest.mark.parametrize("name", ["base", "key", "depth", "kind"])
def test_hyperparameter_named_like_an_input_is_refused(name, irs, signature):
    message = json.loads(irs["ties"])
    message["hyperparameters"] = {name: 1.0}
    for program in message["programs"]:
        _renumber(program["block"])
    assert "hyperparameter" in refused(message, signature).message


def _renumber(block):
    """Add one input to a block."""
    first = block["inputs"]
    block["inputs"] += 1
    for equation in block["equations"]:
        equation[1] = [a + (a >= first) if type(a) is int else a for a in equation[1]]
    block["outputs"] = [a + (a >= first) if type(a) is int else a for a in block["outputs"]]


def _program(equations, output, signature):
    """Return a message with these equations and this output at every shape."""
    message = json.loads(trace_trusted(merge("return 1.5 * task_vectors['expert_1']"), signature))
    for program in message["programs"]:
        program["block"] |= {"equations": copy.deepcopy(equations), "outputs": [output]}
    return message


# Inputs: three experts (0 to 2), the base (3), the key (4), the depth (5).
@pytest.mark.parametrize(
    ("equations", "rule"),
    [
        ([["random_bits", [4], 1, {"bit_width": 32, "shape": [-5]}]], "ir"),
        ([["tile", [0], 1, {"reps": [-1, 1]}]], "ir"),
        ([["iota", [], 1, {"dtype": "int8", "shape": [0, 1 << 40], "dimension": 0}]], "elements"),
        ([["integer_pow", [0], 1, {"y": 1 << 31}]], "ir"),
        ([["integer_pow", [0], 1, {"y": -65}]], "ir"),
        ([["reduce_precision", [0], 1, {"exponent_bits": -1, "mantissa_bits": 3}]], "ir"),
        ([["top_k", [0], 2, {"k": -1, "axis": 1}]], "ir"),
        ([["fft", [0], 1, {"fft_type": "RFFT", "fft_lengths": [-8]}]], "ir"),
        ([["cumsum", [0], 1, {"axis": 0, "reverse": False}]] * 301, "ir"),  # of 1,500 / 5
    ],
)
def test_invalid_shapes_and_counts_are_refused(equations, rule, signature):
    assert refused(_program(equations, 0, signature), signature).rule == rule


def test_empty_loop_costs_its_iterations(signature):
    body = {"inputs": 1, "equations": [], "outputs": [0]}
    loop = {"length": 10**6, "reverse": False, "consts": 0, "carry": 1, "body": body}
    message = _program([["scan", [["float32", 0.0]], 1, loop]], 0, signature)
    assert refused(message, signature).rule == "cost"


def test_full_basis_costs_its_size(signature):
    """Check a tall, thin matrix, whose full basis is far larger than the matrix."""

    def cost(full):
        body = f"""
        u, _, _ = jnp.linalg.svd(task_vectors["expert_1"].reshape(-1, 1), full_matrices={full})
        return task_vectors["expert_1"] + u[0, 0]
        """
        return verify_ir(trace_trusted(merge(body), signature), signature).cost

    assert cost(True) > 20 * cost(False)


def test_unlisted_primitive_is_refused_by_name(signature):
    message = json.loads(trace_trusted(VALID["linear"], signature))
    first_block(message)["equations"][0][0] = "from_the_future"
    assert "`from_the_future`" in refused(message, signature).message


def test_primitive_missing_from_the_running_jax_is_refused_with_its_versions(
    signature, monkeypatch
):
    ir = trace_trusted(VALID["linear"], signature)
    lacking = dataclasses.replace(ALLOWED["mul"], bind=None, since="0.99")
    monkeypatch.setitem(ALLOWED, "mul", lacking)
    assert "has no `mul`; JAX 0.99 has it" in refused(ir, signature).message
