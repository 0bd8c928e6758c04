"""From an untrusted message to a checked program. Every field is hostile until it is decoded.

Nothing here binds or runs anything: the result is plain frozen data in which every name is on the
allow-list, every number has its type and range, and every variable is defined before it is used.
Shapes and types of intermediates are left to JAX itself (rebuild.py).
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

MOST_OUTPUTS = 4_096
LONGEST_NAME = 100

Atom = int | np.generic | np.ndarray  # a variable's number, a scalar, or a constant


@dataclass(frozen=True, kw_only=True, eq=False)
class Equation:
    name: str
    operands: tuple[Atom, ...]
    outputs: int
    params: dict[str, Any]  # decoded; sub-programs are Blocks


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    inputs: int
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    loops: bool  # holds a `while`, whose fuel may run out


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    form: Literal["tensor", "tree"]
    hyperparameters: dict[str, float]
    programs: dict[Any, tuple[CallingConvention, Block]]  # by the names of layout.plan
    by_kind: bool


def decode(ir: str, signature: MergeSignature) -> Message:
    """The program in a message, or a Refusal; any surprise at all is a refusal."""
    try:
        return _Decoder(signature).message(ir)
    except Refusal:
        raise
    except (Malformed, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        detail = str(error) if isinstance(error, Malformed) else type(error).__name__
        raise Refusal("refused", "ir", f"the worker's message is not legal ({detail})") from None


class Malformed(ValueError):
    """Where a message departs from the format."""


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise Malformed(what)


def _record(value: Any, *fields: str) -> list[Any]:
    _expect(type(value) is dict and value.keys() == set(fields), "an object of certain fields")
    return [value[field] for field in fields]


def _count(value: Any, most: int) -> int:
    _expect(type(value) is int and 0 <= value <= most, "a count within bounds")
    return value


def _array(value: Any, most: int, what: str) -> list[Any]:
    _expect(type(value) is list and len(value) <= most, what)
    return value


class _Decoder:
    def __init__(self, signature: MergeSignature):
        self.signature, self.limits = signature, signature.limits
        self.constants: list[np.ndarray] = []
        self.equations = 0

    def message(self, ir: str) -> Message:
        _expect(type(ir) is str and len(ir) <= self.limits.ir_bytes, "a message within size")
        data = json.loads(ir, parse_constant=_no_constant)
        # No field twice, no space, no other spelling of a number: one program has one hash.
        _expect(canonical(data) == ir, "the one way to write it")
        version, form, floats, constants, programs = _record(
            data, "version", "form", "hyperparameters", "constants", "programs"
        )
        _expect(version == IR_VERSION and type(version) is int, "the version")
        _expect(form in ("tensor", "tree"), "the form")
        hyperparameters = _hyperparameters(floats)
        self.constants = _constants(constants, self.limits)
        entries = [_record(p, "of", "block") for p in _array(programs, 4_096, "programs")]
        names = [_name(of) for of, _ in entries]
        by_kind = any(isinstance(n, tuple) and n[0] is not None for n in names)
        _expect(form == "tensor" or bool(self.signature.paths), "paths for a tree")
        plan = trace_plan(self.signature, form, by_kind)
        required, expected = plan.required, plan.all
        _expect(names == [n for n in expected if n in names or n in required], "the programs")
        decoded = {}
        for name, (_, block) in zip(names, entries, strict=True):
            convention = expected[name]
            inputs = len(convention.avals(list(hyperparameters)))
            decoded[name] = convention, self.block(block, inputs, convention.leaves, 0)
        return Message(
            form=form, hyperparameters=hyperparameters, programs=decoded, by_kind=by_kind
        )

    def block(self, value: Any, inputs: int, outputs: int | None, depth: int) -> Block:
        _expect(depth <= self.limits.nesting, "nesting")
        given, equations, results = _record(value, "inputs", "equations", "outputs")
        _expect(type(given) is int and given == inputs, "the number of inputs")
        defined, decoded = inputs, []
        for item in _array(equations, self.limits.equations, "equations"):
            equation = self.equation(item, defined, depth)
            defined += equation.outputs
            decoded.append(equation)
        atoms = self.atoms(results, defined, MOST_OUTPUTS)
        _expect(outputs is None or len(atoms) == outputs, "the number of outputs")
        return Block(
            inputs=inputs,
            equations=tuple(decoded),
            outputs=atoms,
            loops=any(_loops(equation) for equation in decoded),
        )

    def equation(self, value: Any, defined: int, depth: int) -> Equation:
        _expect(type(value) is list and len(value) == 4, "an equation")
        name, operands, outputs, params = value
        _expect(type(name) is str, "a primitive's name")
        self.equations += weight(name)
        _expect(self.equations <= self.limits.equations, "equations")
        atoms = self.atoms(operands, defined, MOST_OUTPUTS)
        outputs = _count(outputs, MOST_OUTPUTS)
        _expect(type(params) is dict, "parameters")
        if name in CONTROL_FLOW:
            decoded = getattr(self, name + "_")(params, len(atoms), outputs, depth + 1)
        else:
            _expect(name in ALLOWED, f"`{name[:LONGEST_NAME]}` is not an allowed primitive")
            entry = ALLOWED[name]
            if entry.bind is None:
                have = f"JAX {entry.versions} has it, this is JAX {jax.__version__}"
                raise Refusal("refused", "primitive", f"`{name}` cannot be run here: {have}")
            _expect(entry.arity[0] <= len(atoms) <= entry.arity[1], "the number of operands")
            _expect(params.keys() == entry.params.keys(), "the parameters")
            decoded = {key: read(params[key]) for key, read in entry.params.items()}
        return Equation(name=name, operands=atoms, outputs=outputs, params=decoded)

    def scan_(self, params: Any, operands: int, outputs: int, depth: int) -> dict[str, Any]:
        length, reverse, consts, carry, body = _record(
            params, "length", "reverse", "consts", "carry", "body"
        )
        _expect(type(reverse) is bool, "reverse")
        consts, carry = _count(consts, operands), _count(carry, outputs)
        _expect(consts + carry <= operands, "the operands of scan")
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
        _expect(carry == outputs, "the operands of while")
        decided = self.block(condition, first + carry, 1, depth)
        # It is traced twice, so that conditions within conditions would double at every level.
        _expect(not decided.loops, "a condition without a while loop")
        return {
            "condition_consts": first,
            "body_consts": second,
            "condition": decided,
            "body": self.block(body, second + carry, carry, depth),
        }

    def cond_(self, params: Any, operands: int, outputs: int, depth: int) -> dict[str, Any]:
        (branches,) = _record(params, "branches")
        branches = _array(branches, 64, "branches")
        _expect(bool(branches) and operands >= 1, "branches and an index")
        return {"branches": tuple(self.block(b, operands - 1, outputs, depth) for b in branches)}

    def atoms(self, values: Any, defined: int, most: int) -> tuple[Atom, ...]:
        return tuple(self.atom(v, defined) for v in _array(values, most, "operands"))

    def atom(self, value: Any, defined: int) -> Atom:
        if type(value) is int:
            _expect(0 <= value < defined, "a variable that is defined")
            return value
        _expect(type(value) is list and len(value) == 2, "an operand")
        kind, content = value
        if kind == "constant":
            _expect(type(content) is int and 0 <= content < len(self.constants), "a constant")
            return self.constants[content]
        _expect(type(kind) is str and kind in DTYPES, "a type that is on the list")
        return decode_number(content, DTYPES[kind])


def _no_constant(name: str) -> Any:
    raise Malformed("a number that JSON does not have")


def _name(value: Any) -> Any:
    """A program's name as layout.plan writes it."""
    if type(value) is str:
        return value
    _expect(type(value) is list and len(value) == 2, "a program's name")
    kind, shape = value
    _expect(kind is None or type(kind) is str, "a kind")
    return kind, tuple(_count(n, MAX_DIMENSION) for n in _array(shape, MAX_RANK, "a shape"))


def _hyperparameters(value: Any) -> dict[str, float]:
    _expect(type(value) is dict and len(value) <= 64, "hyperparameters")
    for name, default in value.items():
        legal = name.isidentifier() and name not in REQUESTS and len(name) <= LONGEST_NAME
        _expect(legal, "a hyperparameter's name")
        _expect(type(default) is float and math.isfinite(default), "a hyperparameter's value")
    return value


def _constants(value: Any, limits: Limits) -> list[np.ndarray]:
    arrays, total = [], 0
    for item in _array(value, limits.equations, "constants"):
        kind, shape, text = _record(item, "type", "shape", "data")
        _expect(type(kind) is str and kind in DTYPES, "a constant's type")
        dtype = DTYPES[kind]
        dims = tuple(_count(n, limits.constant_bytes) for n in _array(shape, MAX_RANK, "a shape"))
        size = math.prod(dims) * dtype.itemsize
        total += size
        _expect(total <= limits.constant_bytes, "constants within their size")
        _expect(type(text) is str and len(text) <= size * 4 // 3 + 4, "a constant's data")
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise Malformed("a constant's data") from None
        _expect(len(data) == size, "a constant's data")
        _expect(kind != "bool" or set(data) <= {0, 1}, "a constant's truth values")
        arrays.append(np.frombuffer(data, dtype).reshape(dims))
    return arrays


def _loops(equation: Equation) -> bool:
    if equation.name == "while":
        return True
    inner = [v for v in equation.params.values() if isinstance(v, Block)]
    return any(b.loops for b in (*inner, *equation.params.get("branches", ())))
