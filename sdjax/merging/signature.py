"""Algorithm signatures: the inputs and hyperparameters of a function.

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float32

from sdjax.core.errors import UserError
from sdjax.merging.schedule import Schedule

Tensor = Float32[Array, "*shape"]
TaskVectors = dict[str, Tensor]
"""Expert name to task vector, all of the same shape."""

Form = Literal["tensor", "tree"]
TracedType = Literal["float", "per_expert"]

PerExpert = Annotated[Any, "one value per expert"]
"""Annotation of a hyperparameter with one value per expert (see `sdjax.merging.algorithm`)."""

STATISTICS = ("fisher", "gram", "input_norm")
"""Optional inputs that are statistics of the experts on data (`sdjax.merging.statistics`)."""

OPTIONAL_INPUTS: Mapping[Form, frozenset[str]] = {
    "tensor": frozenset({"base", "key", "depth", "kind", *STATISTICS}),
    "tree": frozenset({"base", "key"}),
}

MIN_SUM = 1e-8  # a smaller sum is treated as zero, as in mergekit

_EXPECTED = {
    "float": "a finite number",
    "unit_interval": "a number from 0 to 1",
    "per_expert": "a finite number, a list with one number per expert, or expert: number",
    "bool": "true or false",
    "int": "an integer",
    "str": "a string",
}


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Conditions on hyperparameters besides their types.

    Values that are traced are unknown and pass. A schedule is checked tensor by tensor.

    Attributes:
        unit_interval: hyperparameters that must be in [0, 1].
        normalized: hyperparameter to a switch: the method divides by the sum over the experts if
            the switch, itself a hyperparameter, is true.
        all_zero: whether a normalized hyperparameter may be zero for every expert, which leaves the
            base.
    """

    unit_interval: tuple[str, ...] = ()
    normalized: Mapping[str, str] = field(default_factory=dict)
    all_zero: bool = False

    def check(self, name: str, values: Mapping[str, Any]) -> None:
        """Check the values of all hyperparameters.

        Args:
            name: the algorithm's name in error messages.
            values: the values in their stored form.

        Raises:
            UserError: a value outside [0, 1], or values that are divided by a sum of zero.
        """
        for key in self.unit_interval:
            for number in _numbers(values[key]):
                if not 0 <= number <= 1:
                    raise UserError(
                        f"{name}: hyperparameter {key!r} must be {_EXPECTED['unit_interval']}, "
                        f"not {number}"
                    )
        for key, switch in self.normalized.items():
            numbers = _numbers(values[key])
            if not (values[switch] and numbers) or abs(sum(numbers)) >= MIN_SUM:
                continue
            if any(numbers) or not self.all_zero:
                remedy = f", or set {switch} to false" if any(numbers) else ""
                raise UserError(
                    f"{name}: the hyperparameter {key!r} sums to zero, so that it cannot be "
                    f"normalized; change it{remedy}"
                )

    def check_without_base(self, name: str, values: Mapping[str, Any]) -> None:
        """Check the hyperparameters of a merge without a base.

        Args:
            name: the algorithm's name in error messages.
            values: the values in their stored form.

        Raises:
            UserError: weights that are zero for every expert, so that the result would be zero.
        """
        for key in self.normalized:
            numbers = _numbers(values[key])
            if numbers and not any(numbers):
                raise UserError(
                    f"{name}: the hyperparameter {key!r} is zero for every expert, and without a "
                    "base the result would be zero; change it for at least one expert"
                )


@dataclass(frozen=True, kw_only=True)
class AlgorithmSignature:
    """The parameters of an algorithm other than the task vectors.

    Attributes:
        requests: the optional inputs that it takes: "base", "key", "depth", "kind", and those of
            `STATISTICS`.
        defaults: default of each hyperparameter.
        types: type of each hyperparameter: "float", "per_expert", "bool", "int" or "str".
    """

    requests: frozenset[str]
    defaults: Mapping[str, Any]
    types: Mapping[str, str]

    @property
    def traced(self) -> dict[str, TracedType]:
        """Return the hyperparameters that arrive as arrays, with their types."""
        return {k: t for k, t in self.types.items() if t in ("float", "per_expert")}  # type: ignore[misc]


def read_signature(function: Callable[..., Any], name: str, form: Form) -> AlgorithmSignature:
    """Read the signature of an algorithm.

    Args:
        function: the algorithm.
        name: its name in error messages.
        form: "tensor" or "tree".

    Raises:
        UserError: the signature does not follow the algorithm API.
    """
    try:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    except (NameError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"{name}: the signature cannot be read ({error})") from error
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not parameters or parameters[0].kind in (*variadic, inspect.Parameter.KEYWORD_ONLY):
        raise UserError(f"{name}: the first parameter must be task_vectors, a dict by expert")
    allowed = OPTIONAL_INPUTS[form]
    requests, defaults, types = set(), {}, {}
    for parameter in parameters[1:]:
        key = parameter.name
        if parameter.kind in variadic or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UserError(f"{name}: parameter {key!r} must be an ordinary named parameter")
        if key in allowed:
            requests.add(key)
        elif key in OPTIONAL_INPUTS["tensor"]:
            raise UserError(
                f"{name}: {key!r} is not available in the tree form; use "
                f"{' or '.join(sorted(allowed))}"
            )
        elif parameter.default is inspect.Parameter.empty:
            raise UserError(
                f"{name}: parameter {key!r} is not an input ({', '.join(sorted(allowed))}) and "
                "has no default; add a default to make it a hyperparameter"
            )
        else:
            types[key] = hyperparameter_type(name, parameter)
            defaults[key] = check_value(name, key, types[key], parameter.default)
    return AlgorithmSignature(requests=frozenset(requests), defaults=defaults, types=types)


def check_value(name: str, key: str, type_name: str, value: Any) -> Any:
    """Return a hyperparameter's value in its stored form.

    Args:
        name: the algorithm's name in error messages.
        key: the hyperparameter.
        type_name: "float", "per_expert", "bool", "int" or "str".
        value: the value to check.

    Returns:
        A float for "float"; a float, a tuple of floats or a dict of floats for "per_expert" (a
        traced scalar may be in place of any float); otherwise the value itself.

    Raises:
        UserError: the value has another type.
    """
    if type_name in ("float", "per_expert") and _is_number(value):
        return _as_float(value)
    if type_name == "per_expert":
        if isinstance(value, Mapping) and all(_is_number(v) for v in value.values()):
            return {str(k): _as_float(v) for k, v in value.items()}
        sequence = not isinstance(value, str | Mapping) and hasattr(value, "__len__")
        if sequence and getattr(value, "ndim", 1) == 1 and all(_is_number(v) for v in value):
            return tuple(_as_float(v) for v in value)
    static = {"bool": bool, "int": int, "str": str}.get(type_name)
    if static and isinstance(value, static) and (static is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{name}: hyperparameter {key!r} must be {_EXPECTED[type_name]}, not {value!r}")


def hyperparameter_type(name: str, parameter: inspect.Parameter) -> str:
    """Return the type of a hyperparameter, as in `AlgorithmSignature.types`.

    Args:
        name: the algorithm's name in error messages.
        parameter: the parameter, with its annotation evaluated.

    Raises:
        UserError: no annotation of a float, or a type that hyperparameters cannot have.
    """
    annotation, key = parameter.annotation, parameter.name
    if annotation == PerExpert:
        return "per_expert"
    if annotation is inspect.Parameter.empty:
        annotation = type(parameter.default)
        if annotation is float:
            raise UserError(
                f"{name}: annotate hyperparameter {key!r}: with `float` it is an array that can "
                "be swept without compilation, with `PerExpert` it has one value per expert"
            )
    if annotation in (float, bool, int, str):
        return annotation.__name__
    raise UserError(
        f"{name}: hyperparameter {key!r} must be annotated float, PerExpert, bool, int or str"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return value.ndim == 0 and np.issubdtype(value.dtype, np.number)
    real = isinstance(value, int | float | np.integer | np.floating) or (
        isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    )
    return real and not isinstance(value, bool) and math.isfinite(float(value))


def _as_float(value: Any) -> Any:
    return value if isinstance(value, jax.core.Tracer) else float(value)


def _numbers(value: Any) -> list[float]:
    """Return the numbers of a value in its stored form; none if one is traced or a schedule."""
    values = value.values() if isinstance(value, Mapping) else value
    numbers = list(values) if isinstance(value, Mapping | tuple) else [value]
    unknown = any(isinstance(number, jax.core.Tracer | Schedule) for number in numbers)
    return [] if unknown else numbers
