"""Encoder from a jaxpr to IR in normal form.

The normal form of an array program is a *block*:

    {"inputs": n, "equations": [[primitive, [atom…], outputs, params]…], "outputs": [atom…]}

An atom is the number of a variable (inputs first, then the results of the equations in order),
`[type, value]` for a scalar, or `["constant", i]` for an array. Calls are inlined, no-op
conversions are dropped, unused equations are removed and variables are renumbered. Hence two
candidates that compute the same thing in the same order have the same IR, whatever their variable
names, helper functions and comments.
"""

import base64
import enum
import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from jax.extend import core

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.parameters import DTYPES, KEY_IMPL, decode_number
from sdjax.sandbox.ir.primitives import ALLOWED, weight
from sdjax.sandbox.refusal import Refusal

# Calls that are replaced by their body -> parameter that holds the body.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
IDENTITIES = ("copy", "stop_gradient", "optimization_barrier", "name")

Atom = Any  # int | list
EncodedEquation = tuple[str, list[Atom], list[int], dict[str, Any]]


class Encoder:
    """Encoder of one candidate's blocks, which share constants and the equation limit."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.constants: list[dict[str, Any]] = []
        self._index: dict[str, int] = {}
        self._bytes = 0
        self._equations = 0

    def start_probes(self) -> None:
        """Start counting equations again, for the copies at the shapes of the probe tensors."""
        self._equations = 0

    def block(self, closed: core.ClosedJaxpr, depth: int = 0) -> dict[str, Any]:
        """Encode a jaxpr that is nested `depth` levels deep.

        Raises:
            Refusal: a primitive is not allowed, or a limit is exceeded.
        """
        if depth > self.limits.nesting:
            limit = self.limits.nesting
            message = f"loops and branches are nested more than {limit} levels deep"
            raise Refusal("too costly", "nesting", message)
        fresh = count(len(closed.jaxpr.invars))
        equations: list[EncodedEquation] = []
        inputs = list(range(len(closed.jaxpr.invars)))
        outputs = self._inline(closed.jaxpr, closed.consts, inputs, equations, fresh, depth)
        return _prune(len(inputs), equations, outputs)

    def _inline(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Atom],
        equations: list[EncodedEquation],
        fresh: Iterator[int],
        depth: int,
    ) -> list[Atom]:
        """Append the equations of a jaxpr to `equations` and return its outputs."""
        atoms: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            atoms[variable] = self._constant(value)

        def read(atom: Any) -> Atom:
            if isinstance(atom, core.Literal):
                return self._constant(atom.val, _dtype(atom))
            return atoms[atom]

        for equation in jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            results = self._equation(equation, operands, equations, fresh, depth)
            atoms.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(
        self,
        equation: Any,
        operands: list[Atom],
        equations: list[EncodedEquation],
        fresh: Iterator[int],
        depth: int,
    ) -> list[Atom]:
        """Append one equation, or its replacement, to `equations` and return its results."""
        name, params = equation.primitive.name, equation.params
        if name in IDENTITIES:
            return operands
        if (
            name == "convert_element_type"
            and (folded := _fold_conversion(equation, operands[0])) is not None
        ):
            return [folded]
        if name in CALLS:
            body = params[CALLS[name]]
            return self._inline(*_open(body), operands, equations, fresh, depth)
        if name == "custom_linear_solve":
            skipped = sum(params["const_lengths"][:2])
            solve = params["jaxprs"].solve
            consts = operands[skipped : skipped + params["const_lengths"].solve]
            vectors = operands[sum(params["const_lengths"]) :]
            return self._inline(*_open(solve), consts + vectors, equations, fresh, depth)
        if name == "platform_index":
            return [["int32", _default_platform(params["platforms"])]]
        if name == "cond" and isinstance(operands[0], list) and operands[0][0] == "int32":
            branches = params["branches"]
            chosen = branches[min(max(operands[0][1], 0), len(branches) - 1)]
            return self._inline(*_open(chosen), operands[1:], equations, fresh, depth)
        if name == "unstack":
            return self._unstack(
                equation.invars[0].aval.shape, params["axis"], operands[0], equations, fresh
            )
        encoded = self._params(equation, depth)
        if name == "sort" and len(operands) == 1:
            encoded["is_stable"] = True  # no-op; newer JAX versions omit it
        return self._append(name, operands, len(equation.outvars), encoded, equations, fresh)

    def _append(
        self,
        name: str,
        operands: list[Atom],
        outputs: int,
        params: dict[str, Any],
        equations: list[EncodedEquation],
        fresh: Iterator[int],
    ) -> list[Atom]:
        self._equations += weight(name)
        if self._equations > self.limits.equations:
            raise Refusal(
                "too costly",
                "equations",
                f"the array program has more than {self.limits.equations} operations;"
                " if a Python loop creates them, use fewer steps or jax.lax.fori_loop",
            )
        results = [next(fresh) for _ in range(outputs)]
        equations.append((name, operands, results, params))
        return list(results)

    def _unstack(
        self,
        shape: Sequence[int],
        axis: int,
        operand: Atom,
        equations: list[EncodedEquation],
        fresh: Iterator[int],
    ) -> list[Atom]:
        """Encode `unstack` as slices, as JAX before 0.12 traces `for row in x`."""
        results = []
        for index in range(shape[axis]):
            start, limit = [0] * len(shape), list(shape)
            start[axis], limit[axis] = index, index + 1
            bounds = {"start_indices": start, "limit_indices": limit, "strides": [1] * len(shape)}
            (row,) = self._append("slice", [operand], 1, bounds, equations, fresh)
            results += self._append("squeeze", [row], 1, {"dimensions": [axis]}, equations, fresh)
        return results

    def _params(self, equation: Any, depth: int) -> dict[str, Any]:
        """Return the parameters in the IR's own form, which does not depend on JAX's names."""
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            body = _closed(params["jaxpr"])
            # A scanned operand or a stacked result has one more axis than inside the body.
            scanned = _count_longer(equation.invars, body.jaxpr.invars)
            stacked = _count_longer(equation.outvars, body.jaxpr.outvars)
            carry = len(equation.outvars) - stacked
            return {
                "length": int(params["length"]),
                "reverse": bool(params["reverse"]),
                "consts": len(equation.invars) - carry - scanned,
                "carry": carry,
                "body": self.block(body, depth + 1),
            }
        if name == "while":
            condition, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
            carry = len(equation.outvars)
            block = self.block(condition, depth + 1)
            if _holds_while(block):
                message = (
                    "the condition of a `while` loop contains another one; move it to the body"
                )
                raise Refusal("refused", "nesting", message)
            return {
                "condition_consts": len(condition.jaxpr.invars) - carry,
                "body_consts": len(body.jaxpr.invars) - carry,
                "condition": block,
                "body": self.block(body, depth + 1),
            }
        if name == "cond":
            branches = [self.block(_closed(b), depth + 1) for b in params["branches"]]
            return {"branches": branches}
        if name == "reduce":
            return {
                "axes": _parameter(params["dimensions"]),
                "reducers": _reducers(*_open(params["jaxpr"])),
            }
        entry = ALLOWED.get(name)
        if entry is None:
            raise Refusal("refused", "primitive", f"the operation `{name}` is not allowed")
        for key, value in entry.fixed.items():
            if params.get(key, value) != value:  # some JAX versions lack the parameter
                raise Refusal(
                    "refused", "primitive", f"`{name}` with the option {key} is not allowed"
                )
        try:
            return {key: _parameter(params[key]) for key in entry.params}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal("refused", "primitive", f"`{name}` with these options: {error}") from None

    def _constant(self, value: Any, dtype: Any = None) -> Atom:
        if dtype is not None and dtype not in DTYPES.values():
            raise Refusal("refused", "constant", "a constant has a dtype that is not allowed")
        array = np.asarray(value, dtype)
        name = array.dtype.name
        if name not in DTYPES:
            raise Refusal("refused", "constant", f"a constant of dtype {name} is not allowed")
        if array.ndim == 0:
            return [name, encode_number(array.astype(np.float32) if name == "bfloat16" else array)]
        data = np.ascontiguousarray(array).tobytes()
        digest = hashlib.sha256(f"{name}{array.shape}".encode() + data).hexdigest()
        if digest not in self._index:
            self._bytes += len(data)
            if self._bytes > self.limits.constant_bytes:
                limit = self.limits.constant_bytes
                raise Refusal("too costly", "constants", f"constants take more than {limit} bytes")
            self._index[digest] = len(self.constants)
            text = base64.b64encode(data).decode()
            self.constants.append({"type": name, "shape": list(array.shape), "data": text})
        return ["constant", self._index[digest]]


def encode_number(value: Any) -> Any:
    """Return a scalar as JSON, exactly; "nan", "inf" and "-inf" are strings."""
    value = np.asarray(value)
    if value.dtype.kind == "b":
        return bool(value)
    if value.dtype.kind in "iu":
        return int(value)
    if value.dtype.kind == "c":
        return [encode_number(value.real), encode_number(value.imag)]
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _parameter(value: Any) -> Any:
    """Return a parameter of a primitive as JSON; the allow-list has the decoders."""
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if KEY_IMPL is not None and value is KEY_IMPL:
        return value.name
    if hasattr(value, "_fields"):
        return {field: _parameter(getattr(value, field)) for field in value._fields}
    if isinstance(value, (tuple, list)):
        return [_parameter(v) for v in value]
    if isinstance(value, (np.dtype, type)):
        name = np.dtype(value).name
        if name not in DTYPES:
            raise ValueError(f"the dtype {name} is not allowed")
        return name
    return encode_number(value)


def _count_longer(outside: Any, inside: Any) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in pairs)


def _dtype(literal: Any) -> Any:
    return literal.aval.dtype


def _open(body: Any) -> tuple[Any, Any]:
    """Return the jaxpr and the constants of an open or closed jaxpr."""
    return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())


def _closed(body: Any) -> core.ClosedJaxpr:
    return body if hasattr(body, "consts") else core.ClosedJaxpr(body, ())


def _reducers(jaxpr: core.Jaxpr, consts: Sequence[Any]) -> list[str]:
    """Return the name of the function that reduces each operand of `jax.lax.reduce`."""
    names, count = [], len(jaxpr.outvars)
    for index, result in enumerate(jaxpr.outvars):
        pair = [jaxpr.invars[index], jaxpr.invars[count + index]]
        names += [
            equation.primitive.name
            for equation in jaxpr.eqns
            if equation.outvars[0] is result and equation.invars in (pair, pair[::-1])
        ]
    if len(names) != count or not set(names) <= {"add", "min", "max"}:
        message = "jax.lax.reduce reduces each operand by jax.lax.add, min or max"
        raise Refusal("refused", "primitive", message)
    return names


def _default_platform(platforms: Any) -> int:
    """Return the index of the default branch, which is valid on every platform."""
    for index, names in enumerate(platforms):
        if names is None:
            return index
    raise Refusal("refused", "primitive", "the computation depends on the platform")


def _fold_conversion(equation: Any, operand: Atom) -> Atom | None:
    """Return the operand if the dtype is unchanged, the converted scalar if it is a literal."""
    source, target = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    if source == target:
        return operand
    literal = isinstance(operand, list) and operand[0] in DTYPES
    if literal and target == np.float32 and source.kind in "biu":
        value = decode_number(operand[1], DTYPES[operand[0]])
        return ["float32", encode_number(value.astype(np.float32))]
    return None


def _holds_while(block: dict[str, Any]) -> bool:
    return any(
        name == "while"
        or any(
            _holds_while(inner)
            for inner in (*params.values(), *params.get("branches", ()))
            if isinstance(inner, dict) and "equations" in inner
        )
        for name, _, _, params in block["equations"]
    )


def _prune(inputs: int, equations: list[EncodedEquation], outputs: list[Atom]) -> dict[str, Any]:
    """Drop unused equations and renumber the variables."""
    live = {atom for atom in outputs if isinstance(atom, int)}
    kept = []
    for equation in reversed(equations):
        if live.intersection(equation[2]):
            kept.append(equation)
            live.update(atom for atom in equation[1] if isinstance(atom, int))
    numbers = {i: i for i in range(inputs)}
    renumbered = []
    for name, operands, results, params in reversed(kept):
        atoms = [numbers[a] if isinstance(a, int) else a for a in operands]
        renumbered.append([name, atoms, len(results), params])
        for result in results:
            numbers[result] = len(numbers)
    final = [numbers[a] if isinstance(a, int) else a for a in outputs]
    return {"inputs": inputs, "equations": renumbered, "outputs": final}
