"""Classification of a program's operations into families, by abstract interpretation of jaxprs.

For every value, the reader tracks the experts it depends on, a few tags (magnitude, sign, dot
product, ...), and its linear form over earlier tensors, if it has one. The primitives that combine
such values determine the families.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from sdjax.programs.family_values import TRANSPARENT, Value, constant_value, evaluated, union
from sdjax.sandbox.ir.primitives import ALLOWED

# Limits on the interpretation of hostile programs; beyond them, the result is incomplete.
_MAX_STEPS = 20_000
_MAX_TERMS = 64

_COMPARISONS = {"gt", "lt", "ge", "le", "eq", "ne"}
_SATURATING = {"tanh": "saturation"} | dict.fromkeys(("exp", "exp2", "logistic"), "soft_gate")
_SELECTED = {"magnitude", "sign", "norm", "dot", "mean"}  # tags that survive a selection
_ADDED = {"scaled", "projection", "centered"}  # tags of a sum if any of its terms has them


class FamilyReader:
    """Abstract interpreter of jaxprs that collects families.

    Attributes:
        found: families found so far.
        used: inputs that the results depend on.
    """

    def __init__(self) -> None:
        """Create a reader with no families found."""
        self.found: set[str] = set()
        self.used: set[str] = set()
        self._atoms: list[Value] = []
        self._terms: dict[frozenset[tuple[int, float]], Value] = {}
        self._steps = 0

    def atom(self, experts: frozenset[str], *tags: str, scalar: bool = False) -> Value:
        """Return a new value; unless it is a scalar, it becomes an atom of linear forms."""
        form = {} if scalar else {len(self._atoms): 1.0}
        value = Value(experts=experts, tags=frozenset(tags), form=form, scalar=scalar)
        self._atoms.append(value)
        return value

    def finish(self, outputs: Sequence[Value]) -> None:
        """Record the families of the final results and the inputs they depend on."""
        for value in outputs:
            self.classify(value)
            self.used |= value.experts

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
        """Interpret a jaxpr and return its result values."""
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {v: constant_value(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> Value:
            return constant_value(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            results = self.equation(equation, operands)
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def call(self, jaxpr: Any, operands: Sequence[Value]) -> list[Value]:
        """Interpret an open or closed jaxpr and return its result values."""
        return self.run(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), operands)

    def equation(self, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
        """Interpret an equation, including the jaxprs of control flow, and return its results."""
        params, name = equation.params, equation.primitive.name
        self._steps += 1
        if self._steps > _MAX_STEPS:
            return [self.merge(operands)] * len(equation.outvars)
        if name == "cond":
            index, *inputs = operands
            branches = [self.call(branch, inputs) for branch in params["branches"]]
            return [self.merge([index, *results]) for results in zip(*branches, strict=True)]
        if name == "while":
            body, count = params["body_jaxpr"], len(equation.outvars)
            state = operands[len(operands) - count :]
            consts = operands[len(operands) - len(body.in_avals) : len(operands) - count]
            for _ in range(2):  # the second pass sees what the body adds to the carry
                results = self.call(body, [*consts, *state])
                state = [self.merge(pair) for pair in zip(state, results, strict=True)]
            return state
        if name == "scan":
            carry = self.merge([*operands, *self.call(params["jaxpr"], operands)])
            return self.call(
                params["jaxpr"], [self.merge([operand, carry]) for operand in operands]
            )
        if name in ALLOWED and (fallback := ALLOWED[name].fallback) is not None:
            # Only newer JAX versions have this primitive; the families must not depend on that.
            expansion = jax.make_jaxpr(fallback)(*(v.aval for v in equation.invars))
            return self.call(expansion, operands)
        body = params.get("jaxpr", params.get("call_jaxpr"))
        if body is not None:
            return self.call(body, operands)
        result = self.primitive(equation, name, operands)
        ranks = [getattr(v.aval, "ndim", 0) for v in (*equation.invars, equation.outvars[0])]
        if any("stack" in v.tags for v in operands) and max(ranks) == ranks[-1]:
            result = replace(result, tags=result.tags | {"stack"})
        return [result] * len(equation.outvars)

    def merge(self, values: Sequence[Value]) -> Value:
        """Return the join of values: a value that may be any of them."""
        joined = union(values)
        return self.atom(joined.experts, *joined.tags, scalar=joined.scalar)

    def classify(self, value: Value) -> None:
        """Record the families of a complete linear form."""
        terms = [(n, self._atoms[n], c) for n, c in value.form.items() if abs(c) > 1e-12]
        if any("centered" in term.tags for _, term, _ in terms):
            self.found.add("center")
        # An expert's own terms count once. The row means of a sum of experts are no further expert.
        coefficients: dict[frozenset[str] | int, float] = {}
        for n, term, c in terms:
            if len(term.sources) == 1:
                coefficients.setdefault(term.sources, c)
            elif term.sources and "row" not in term.tags:
                coefficients[n] = c
        if len(coefficients) < 2:
            return
        if any("scaled" in term.tags for _, term, _ in terms):
            self.found.add("norm_balance")
        if any("projection" in term.tags and c < 0 for _, term, c in terms):
            self.found.add("projection_removal")
        factors = list(coefficients.values())
        if "multiple" in value.tags or all(abs(c) == 1 for c in factors):
            return
        equal = np.allclose(factors, factors[0], rtol=1e-5)
        self.found.add("scaling" if equal else "weighted_sum")
        if math.isclose(sum(factors), 1, rel_tol=1e-5):
            self.found.add("interpolation")

    def primitive(self, equation: JaxprEqn, name: str, operands: list[Value]) -> Value:
        """Return the result of a primitive other than control flow."""
        experts = union(operands).experts
        scalar = math.prod(getattr(equation.outvars[0].aval, "shape", ())) == 1
        constants = [v.constant for v in operands if v.constant is not None]
        if scalar and operands and len(constants) == len(operands):
            return evaluated(name, constants)
        first = operands[0] if operands else Value()
        second = operands[1] if len(operands) > 1 else Value()
        if name == "slice" and first.parts:
            start, limit = equation.params["start_indices"][0], equation.params["limit_indices"][0]
            return self.stack(first.parts[start:limit])
        if name == "squeeze" and len(first.parts) == 1:
            return first.parts[0]
        if name in TRANSPARENT:
            shape = getattr(equation.outvars[0].aval, "shape", ())
            spread = name == "broadcast_in_dim" and first.scalar and not scalar
            return replace(first, scalar=first.scalar and (scalar or spread or not shape))
        if name == "neg":
            return self.scaled(first, -1.0)
        if name in ("add", "sub", "add_any"):
            return self.sum(first, second, -1.0 if name == "sub" else 1.0)
        if name == "mul":
            return self.product(equation, first, second, experts)
        if name == "div":
            return self.quotient(first, second, experts)
        for operand in operands:
            if name != "square" or "centered" not in operand.tags:  # a variance is not centering
                self.classify(operand)
        if name in ("abs", "square") or (name == "integer_pow" and equation.params["y"] % 2 == 0):
            return self.atom(experts, "magnitude", scalar=first.scalar)
        if name in ("sqrt", "rsqrt", "integer_pow", "pow", "log", "max_power"):
            if "magnitude" in first.tags and first.sources and not first.scalar:
                self.found.add("power")
            return self.atom(experts, *first.tags, scalar=first.scalar)
        if name == "sign":
            return self.atom(experts, "sign", scalar=first.scalar)
        if name in _SATURATING:
            if first.sources and not first.scalar:
                self.found.add(_SATURATING[name])
            return self.atom(experts, "bounded", scalar=first.scalar)
        if name in _COMPARISONS:
            return self.comparison(first, second, experts)
        if name in ("max", "min"):
            return self.extreme(first, second, experts)
        if name == "clamp":
            if second.sources and not second.scalar:
                self.found.add("clip")
            return self.atom(experts, *operands[1].tags, scalar=operands[1].scalar)
        if name == "select_n":
            tags = union(operands[1:]).tags & _SELECTED
            return self.atom(experts, *tags, scalar=all(v.scalar for v in operands))
        if name in ("stack", "concatenate"):
            return self.stack(operands)
        if name.startswith("reduce_") or name in ("argmax", "argmin"):
            return self.reduction(equation, name, first, experts, scalar)
        if name == "dot_general":
            return self.contraction(first, second, experts, scalar)
        if name in ("sort", "gather", "top_k"):
            return self.atom(experts, *first.tags, scalar=scalar)
        return self.atom(experts, scalar=scalar)

    def stack(self, parts: Sequence[Value]) -> Value:
        """Return values stacked along a new first axis."""
        joined = union(parts)
        return replace(self.atom(joined.experts, *joined.tags, "stack"), parts=tuple(parts))

    def scaled(self, value: Value, factor: float, family: str | None = None) -> Value:
        """Return a value times a constant; of several experts at once, this is a `family`."""
        value = self.term(value)
        several = len(value.sources) > 1 and not value.scalar and "row" not in value.tags
        if family and several:
            self.classify(value)
            self.found.add(family)
            value = replace(value, tags=value.tags | {"multiple"})
        return replace(value, form={n: c * factor for n, c in value.form.items()}, parts=())

    def term(self, value: Value) -> Value:
        """Return a linear form of a single expert as one atom, the same for equal forms."""
        if len(value.sources) != 1 or len(value.form) < 2:
            return value
        key = frozenset(value.form.items())
        if key not in self._terms:
            tags = union([self._atoms[n] for n in value.form]).tags & _ADDED
            self._terms[key] = self.atom(value.experts, *tags | value.tags)
        return self._terms[key]

    def sum(self, left: Value, right: Value, sign: float) -> Value:
        """Return a sum or difference."""
        experts = left.experts | right.experts
        for one, other in ((left, right), (right, left)):
            if other.constant == 0:  # the start of an accumulator
                return one if one is left else self.scaled(one, sign)
        if left.scalar and right.scalar:
            return Value(experts=experts, tags=left.tags | right.tags, scalar=True)
        if not left.scalar and right.scalar and "mean" in right.tags and right.sources:
            self.classify(left)
            return self.atom(experts, "centered")
        if left.scalar or right.scalar:  # the sum with an offset is not linear, but a new atom
            tensor = right if left.scalar else left
            self.classify(tensor)
            return self.atom(experts, *tensor.tags & {"magnitude"})
        if left.sources != right.sources:
            left, right = self.term(left), self.term(right)
        form = dict(left.form)
        for atom, coefficient in right.form.items():
            form[atom] = form.get(atom, 0.0) + sign * coefficient
        tags = (left.tags & right.tags) - {"magnitude", "scaled", "multiple", "row"}
        if len(form) > _MAX_TERMS:
            self.classify(Value(experts=experts, form=form))
            return self.atom(experts, *tags)
        return Value(experts=experts, tags=tags, form=form)

    def product(
        self, equation: JaxprEqn, left: Value, right: Value, experts: frozenset[str]
    ) -> Value:
        """Return an elementwise product."""
        for one, other in ((left, right), (right, left)):
            if one.constant is not None:
                return self.scaled(other, one.constant, "scaling")
        if left.scalar and right.scalar:
            same = equation.invars[0] is equation.invars[1]
            tags = (left.tags | right.tags) | ({"norm"} if same else set())
            return Value(experts=experts, tags=tags, scalar=True)
        for one, other in ((left, right), (right, left)):
            if one.scalar and not other.scalar:
                return self.scaled_by(one, other, experts)
        if equation.invars[0] is equation.invars[1]:
            self.classify(left)
            return self.atom(experts, "magnitude")
        self.classify(left)
        self.classify(right)
        tags = left.tags | right.tags
        if left.sources and left.sources == right.sources and "product" not in tags:
            if "magnitude" in tags and not tags & {"mask", "sign", "bounded"}:
                self.found.add("power")
                tags = (left.tags & right.tags) | {"powered"}
            return self.atom(experts, *tags & {"sign", "magnitude", "scaled", "powered"})
        if "mask" in tags:
            return self.atom(experts)
        if "stack" in tags and not (left.experts and right.experts):
            return self.atom(experts, "weights")
        return self.atom(experts, "product")

    def scaled_by(self, scalar: Value, tensor: Value, experts: frozenset[str]) -> Value:
        """Return a tensor multiplied by a non-constant scalar."""
        self.classify(tensor)
        tags = {*tensor.tags & {"sign", "magnitude", "powered", "product"}}
        if "dot" in scalar.tags:
            self.found.add("cosine_weight")
            tags.add("projection")
        elif "norm" in scalar.tags and scalar.sources:
            if "sign" in tensor.tags:
                self.found.add("sign_only")
                tags -= {"sign"}
            elif not tensor.tags & {"bounded", "sign"} and tensor.sources:
                tags.add("scaled")
        return self.multiple(tensor, experts, tags)

    def quotient(self, left: Value, right: Value, experts: frozenset[str]) -> Value:
        """Return an elementwise quotient."""
        if right.constant:
            count = len(left.sources) if len(left.form) > 1 or "stack_sum" in left.tags else 0
            family = "mean" if right.constant == count else "scaling"
            return self.scaled(left, 1 / right.constant, family)
        if "weights" in left.tags and not right.experts:  # jnp.average
            self.found.add("mean")
        if left.scalar and right.scalar:
            scalar_tags = left.tags | right.tags
            if "dot" in scalar_tags:  # a cosine, or a projection's coefficient
                scalar_tags -= {"norm"}
            return Value(experts=experts, tags=scalar_tags, scalar=True)
        self.classify(left)
        tags = {*left.tags & {"sign", "magnitude", "product", "projection"}}
        if (
            right.scalar
            and "norm" in right.tags
            and left.sources
            and not left.tags & {"sign", "magnitude", "powered"}
        ):
            tags.add("scaled")
        return self.multiple(left, experts, tags)

    def multiple(self, tensor: Value, experts: frozenset[str], tags: Iterable[str]) -> Value:
        """Return a tensor times a scalar: an atom with the coefficient of a single tensor."""
        factors = list(tensor.form.values()) or [1.0]
        factor = -1.0 if all(factor < 0 for factor in factors) else 1.0
        if len(factors) == 1 and "sign" not in tensor.tags:  # signs have no scale of their own
            factor = factors[0]
        value = self.atom(experts, *tags)
        return replace(value, form=dict.fromkeys(value.form, factor))

    def comparison(self, left: Value, right: Value, experts: frozenset[str]) -> Value:
        """Return the mask of a comparison."""
        if "magnitude" in left.tags & right.tags and not (left.scalar or right.scalar):
            if left.sources and right.sources and left.sources != right.sources:
                self.found.add("max_magnitude")
        else:
            for one, other in ((left, right), (right, left)):
                if one.scalar or not one.sources:
                    continue
                if "magnitude" in one.tags:
                    self.found.add("magnitude_trim")
                elif "base" not in one.experts | other.experts and (
                    one.tags & {"product", "sign"} or other.constant == 0
                ):
                    self.found.add("sign_gate")
        return self.atom(experts, "mask", scalar=left.scalar and right.scalar)

    def extreme(self, left: Value, right: Value, experts: frozenset[str]) -> Value:
        """Return an elementwise maximum or minimum."""
        tensors = [v for v in (left, right) if v.sources and not v.scalar]
        magnitudes = ["magnitude" in v.tags for v in tensors]
        if len(tensors) == 2 and left.sources != right.sources:
            self.found.add("max_magnitude" if all(magnitudes) else "extremes")
        elif len(tensors) == 1:
            self.found.add("magnitude_trim" if magnitudes[0] else "clip")
        tags = left.tags | right.tags if left.scalar and right.scalar else left.tags & right.tags
        if magnitudes and all(magnitudes):
            tags |= {"magnitude"}
        return self.atom(experts, *tags, scalar=left.scalar and right.scalar)

    def reduction(
        self, equation: JaxprEqn, name: str, value: Value, experts: frozenset[str], scalar: bool
    ) -> Value:
        """Return a reduction over axes."""
        axes, shape = equation.params.get("axes", ()), getattr(equation.invars[0].aval, "shape", ())
        if "stack" in value.tags and len(axes) == 1 and not scalar:
            if name in ("reduce_max", "argmax") and "magnitude" in value.tags:
                self.found.add("max_magnitude")
            elif name in ("reduce_max", "reduce_min"):
                self.found.add("extremes")
            if name == "reduce_sum" and "weights" in value.tags:
                self.found.add("weighted_sum")
            return self.atom(experts, "stack_sum", *value.tags & {"weights"})
        if scalar:
            if "product" in value.tags:
                return self.atom(experts, "dot", scalar=True)
            if "magnitude" in value.tags:
                return self.atom(experts, "norm", scalar=True)
            return self.atom(experts, "mean", scalar=True)
        if value.sources and len(axes) < len(shape):
            self.found.add("row_mean")
        return self.atom(experts, "row", *value.tags & {"magnitude"})

    def contraction(
        self, left: Value, right: Value, experts: frozenset[str], scalar: bool
    ) -> Value:
        """Return a tensor contraction."""
        if scalar:
            same = left.sources == right.sources
            return self.atom(experts, "norm" if same else "dot", scalar=True)
        if left.constant is None and not left.experts and "stack" in right.tags:
            self.found.add("weighted_sum")
        return self.atom(experts)
