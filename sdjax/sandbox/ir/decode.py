"""Decoder of untrusted IR. Every field is hostile until it is decoded.

Decoding binds and runs nothing. In the result, every primitive is on the allow-list, every number
has the right type and range, and every variable is defined before its use. JAX checks the shapes
and dtypes of intermediates later (verify/verified_program.py).
"""

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.calling_convention import IR_VERSION, REQUESTS, CallingConvention, trace_plan
from sdjax.sandbox.ir.hashes import canonical
from sdjax.sandbox.ir.parameters import DTYPES, MAX_DIMENSION, MAX_RANK, decode_number
from sdjax.sandbox.ir.primitives import ALLOWED, CONTROL_FLOW, weight
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature

MAX_OUTPUTS = 4_096
MAX_NAME_LENGTH = 100

Atom = int | np.generic | np.ndarray  # number of a variable, scalar, or constant


@dataclass(frozen=True, kw_only=True, eq=False)
class Equation:
    """One application of a primitive.

    Attributes:
        name: name of the primitive.
        operands: variables, scalars and constants.
        outputs: number of results.
        params: decoded parameters; sub-programs are Blocks.
    """

    name: str
    operands: tuple[Atom, ...]
    outputs: int
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """An array program or a sub-program.

    Attributes:
        inputs: number of inputs, which are the first variables.
        equations: equations; their results are the next variables.
        outputs: results of the block.
        loops: whether it contains a `while` loop, which may be cut off.
    """

    inputs: int
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    loops: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """The decoded IR of one candidate.

    Attributes:
        form: "tensor" for merge_models, "tree" for merge_trees.
        hyperparameters: default values of the traced hyperparameters.
        programs: array programs by their names in the trace plan.
        by_kind: whether there is one array program per kind and shape rather than per shape.
    """

    form: Literal["tensor", "tree"]
    hyperparameters: dict[str, float]
    programs: dict[Any, tuple[CallingConvention, Block]]
    by_kind: bool


def decode(ir: str, signature: MergeSignature) -> Message:
    """Decode IR.

    Raises:
        Refusal: the IR departs from the format in any way.
    """
    try:
        return _Decoder(signature).message(ir)
    except Refusal:
        raise
    except (Malformed, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        detail = str(error) if isinstance(error, Malformed) else type(error).__name__
        raise Refusal("refused", "ir", f"the worker's IR is malformed ({detail})") from None


class Malformed(ValueError):
    """Raised when the IR departs from the format; the message says what was expected."""


def _expect(condition: bool, expected: str) -> None:
    if not condition:
        raise Malformed(f"expected {expected}")


def _record(value: Any, *fields: str) -> list[Any]:
    _expect(
        type(value) is dict and value.keys() == set(fields),
        f"an object with the fields {', '.join(fields)}",
    )
    return [value[field] for field in fields]


def _count(value: Any, limit: int) -> int:
    _expect(type(value) is int and 0 <= value <= limit, f"an integer from 0 to {limit}")
    return value


def _array(value: Any, max_length: int, name: str) -> list[Any]:
    _expect(
        type(value) is list and len(value) <= max_length, f"a list of at most {max_length} {name}"
    )
    return value


class _Decoder:
    def __init__(self, signature: MergeSignature):
        self.signature, self.limits = signature, signature.limits
        self.constants: list[np.ndarray] = []
        self.equations = 0

    def message(self, ir: str) -> Message:
        _expect(
            type(ir) is str and len(ir) <= self.limits.ir_bytes,
            f"a text of at most {self.limits.ir_bytes} bytes",
        )
        data = json.loads(ir, parse_constant=_no_constant)
        # Without this, duplicate keys, spaces or alternative spellings would give one program many
        # hashes.
        _expect(canonical(data) == ir, "canonical JSON")
        version, form, floats, constants, programs = _record(
            data, "version", "form", "hyperparameters", "constants", "programs"
        )
        _expect(version == IR_VERSION and type(version) is int, f"version {IR_VERSION}")
        _expect(form in ("tensor", "tree"), "the form tensor or tree")
        hyperparameters = _hyperparameters(floats, self.signature)
        self.constants = _constants(constants, self.limits)
        entries = [_record(p, "of", "block") for p in _array(programs, 4_096, "programs")]
        names = [_name(of) for of, _ in entries]
        by_kind = any(isinstance(n, tuple) and n[0] is not None for n in names)
        _expect(
            form == "tensor" or bool(self.signature.paths),
            "a signature with paths, as the form is tree",
        )
        plan = trace_plan(self.signature, form, by_kind)
        required, expected = plan.required, plan.all
        _expect(
            names == [n for n in expected if n in names or n in required],
            "the array programs of the trace plan",
        )
        decoded: dict[Any, tuple[CallingConvention, Block]] = {}
        for name, (_, block) in zip(names, entries, strict=True):
            if name not in required and decoded.keys() <= required.keys():
                self.equations = 0  # the copies for the probe have their own budget
            convention = expected[name]
            inputs = len(convention.avals(list(hyperparameters)))
            decoded[name] = convention, self.block(block, inputs, convention.num_leaves, 0)
        return Message(
            form=form, hyperparameters=hyperparameters, programs=decoded, by_kind=by_kind
        )

    def block(self, value: Any, inputs: int, outputs: int | None, depth: int) -> Block:
        _expect(depth <= self.limits.nesting, f"a nesting of at most {self.limits.nesting} levels")
        num_inputs, equations, results = _record(value, "inputs", "equations", "outputs")
        _expect(type(num_inputs) is int and num_inputs == inputs, f"{inputs} inputs")
        defined, decoded = inputs, []
        for item in _array(equations, self.limits.equations, "equations"):
            equation = self.equation(item, defined, depth)
            defined += equation.outputs
            decoded.append(equation)
        atoms = self.atoms(results, defined, MAX_OUTPUTS)
        _expect(outputs is None or len(atoms) == outputs, f"{outputs} outputs")
        return Block(
            inputs=inputs,
            equations=tuple(decoded),
            outputs=atoms,
            loops=any(_loops(equation) for equation in decoded),
        )

    def equation(self, value: Any, defined: int, depth: int) -> Equation:
        _expect(type(value) is list and len(value) == 4, "an equation with four fields")
        name, operands, outputs, params = value
        _expect(type(name) is str, "the name of a primitive")
        self.equations += weight(name)
        _expect(
            self.equations <= self.limits.equations, f"at most {self.limits.equations} equations"
        )
        atoms = self.atoms(operands, defined, MAX_OUTPUTS)
        outputs = _count(outputs, MAX_OUTPUTS)
        _expect(type(params) is dict, "an object with parameters")
        if name in CONTROL_FLOW:
            decoded = getattr(self, name + "_")(params, len(atoms), outputs, depth + 1)
        else:
            _expect(name in ALLOWED, f"an allowed primitive, not `{name[:MAX_NAME_LENGTH]}`")
            entry = ALLOWED[name]
            if entry.bind is None:
                message = f"JAX {jax.__version__} has no `{name}`; JAX {entry.since} has it"
                raise Refusal("refused", "primitive", message)
            low, high = entry.arity
            _expect(low <= len(atoms) <= high, f"{low} to {high} operands of `{name}`")
            _expect(params.keys() == entry.params.keys(), f"the parameters of `{name}`")
            decoded = {key: read(params[key]) for key, read in entry.params.items()}
        return Equation(name=name, operands=atoms, outputs=outputs, params=decoded)

    def scan_(self, params: Any, operands: int, outputs: int, depth: int) -> dict[str, Any]:
        length, reverse, consts, carry, body = _record(
            params, "length", "reverse", "consts", "carry", "body"
        )
        _expect(type(reverse) is bool, "a boolean for reverse")
        consts, carry = _count(consts, operands), _count(carry, outputs)
        _expect(consts + carry <= operands, "the operands of a scan")
        return {
            "length": _count(length, MAX_DIMENSION),
            "reverse": reverse,
            "consts": consts,
            "carry": carry,
            "body": self.block(body, operands, outputs, depth),
        }

    def while_(self, params: Any, operands: int, outputs: int, depth: int) -> dict[str, Any]:
        first, second, condition, body = _record(
            params, "condition_consts", "body_consts", "condition", "body"
        )
        first, second = _count(first, operands), _count(second, operands)
        carry = operands - first - second
        _expect(carry == outputs, "the operands of a while loop")
        condition_block = self.block(condition, first + carry, 1, depth)
        # A condition is traced twice, so nested conditions would double the work at every level.
        _expect(not condition_block.loops, "a condition without a while loop")
        return {
            "condition_consts": first,
            "body_consts": second,
            "condition": condition_block,
            "body": self.block(body, second + carry, carry, depth),
        }

    def cond_(self, params: Any, operands: int, outputs: int, depth: int) -> dict[str, Any]:
        (branches,) = _record(params, "branches")
        branches = _array(branches, 64, "branches")
        _expect(bool(branches) and operands >= 1, "at least one branch and an index")
        return {"branches": tuple(self.block(b, operands - 1, outputs, depth) for b in branches)}

    def atoms(self, values: Any, defined: int, max_length: int) -> tuple[Atom, ...]:
        return tuple(self.atom(v, defined) for v in _array(values, max_length, "operands"))

    def atom(self, value: Any, defined: int) -> Atom:
        if type(value) is int:
            _expect(0 <= value < defined, "a variable that is already defined")
            return value
        _expect(type(value) is list and len(value) == 2, "an operand")
        kind, content = value
        if kind == "constant":
            _expect(
                type(content) is int and 0 <= content < len(self.constants),
                "the index of a constant",
            )
            return self.constants[content]
        _expect(type(kind) is str and kind in DTYPES, "an allowed dtype")
        return decode_number(content, DTYPES[kind])


def _no_constant(name: str) -> Any:
    raise Malformed(f"expected a JSON number, not {name}")


def _name(value: Any) -> Any:
    """Decode the name of an array program; see `TracePlan`."""
    if type(value) is str:
        return value
    _expect(type(value) is list and len(value) == 2, "the name of an array program")
    kind, shape = value
    _expect(kind is None or type(kind) is str, "a kind or null")
    return kind, tuple(_count(n, MAX_DIMENSION) for n in _array(shape, MAX_RANK, "axes"))


def _hyperparameters(value: Any, signature: MergeSignature) -> dict[str, float]:
    _expect(type(value) is dict and len(value) <= 1_024, "at most 1024 hyperparameters")
    for name, default in value.items():
        stem, dot, _ = name.partition(".")
        is_valid = stem.isidentifier() and stem not in REQUESTS and len(stem) <= MAX_NAME_LENGTH
        _expect(is_valid, "a hyperparameter with a valid name")
        scalars = signature.per_expert_names(stem) if dot else [name]
        _expect(name in scalars and value.keys() >= set(scalars), "one value per expert")
        _expect(
            type(default) is float and math.isfinite(default),
            "a hyperparameter with a finite float value",
        )
    return value


def _constants(value: Any, limits: Limits) -> list[np.ndarray]:
    arrays, total = [], 0
    for item in _array(value, limits.equations, "constants"):
        kind, shape, text = _record(item, "type", "shape", "data")
        _expect(type(kind) is str and kind in DTYPES, "a constant of an allowed dtype")
        dtype = DTYPES[kind]
        dims = tuple(_count(n, limits.constant_bytes) for n in _array(shape, MAX_RANK, "axes"))
        size = math.prod(dims) * dtype.itemsize
        total += size
        _expect(
            total <= limits.constant_bytes, f"at most {limits.constant_bytes} bytes of constants"
        )
        _expect(type(text) is str and len(text) <= size * 4 // 3 + 4, "valid constant data")
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise Malformed("expected constant data in base64") from None
        _expect(len(data) == size, f"{size} bytes of constant data")
        _expect(kind != "bool" or set(data) <= {0, 1}, "booleans in a constant of dtype bool")
        arrays.append(np.frombuffer(data, dtype).reshape(dims))
    return arrays


def _loops(equation: Equation) -> bool:
    if equation.name == "while":
        return True
    inner = [v for v in equation.params.values() if isinstance(v, Block)]
    return any(b.loops for b in (*inner, *equation.params.get("branches", ())))
