"""Inputs and hyperparameters that a candidate requests by the names of its parameters.

The rules are those of the algorithm API (`sdjax.merging.signature`), with one exception: a
parameter of any other type keeps its default, as language models write many of them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from sdjax.core.errors import UserError, did_you_mean
from sdjax.merging.signature import STATISTICS, check_value, hyperparameter_type
from sdjax.sandbox.ir.calling_convention import REQUESTS
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature

MAX_FLOAT32 = float(np.finfo(np.float32).max)
_BUILTIN_TYPES = {kind.__name__: kind for kind in (float, int, bool, str)}
_TYPE_NAMES = {"per_expert": "PerExpert"}


@dataclass(frozen=True, kw_only=True)
class RequestedInputs:
    """Inputs that a candidate is called with, in addition to the task vectors.

    Attributes:
        requests: optional inputs of the API: base, key, depth, kind.
        scalars: default values of the traced hyperparameters, sorted by name; a PerExpert has one
            per expert (`MergeSignature.per_expert_names`).
        per_expert: the PerExpert hyperparameters.
        static: values of bool, int and str hyperparameters that the user has set.
    """

    requests: tuple[str, ...]
    scalars: Mapping[str, float]
    per_expert: tuple[str, ...]
    static: Mapping[str, bool | int | str]

    @classmethod
    def of(cls, function: Callable, form: str, signature: MergeSignature) -> "RequestedInputs":
        """Read the parameters of a merge function of the given form ("tensor" or "tree").

        Raises:
            Refusal: the parameters do not follow the algorithm API, or the user has set a
                hyperparameter that does not exist or has another type.
        """
        requests, types, defaults = [], {}, {}
        available = REQUESTS if form == "tensor" else ("base", "key")
        for parameter in _parameters(function):
            name, default = parameter.name, parameter.default
            if name in REQUESTS and name not in available:
                raise _refuse(f"merge_trees does not receive `{name}`; it may request base and key")
            if name in available:
                requests.append(name)
            elif name in STATISTICS:
                raise _refuse(f"`{name}`: programs do not receive statistics of data")
            elif default is inspect.Parameter.empty:
                names = ", ".join(available)
                raise _refuse(f"the parameter `{name}` needs a default (only {names} do not)")
            elif type_name := _type_of(parameter):
                types[name], defaults[name] = type_name, default
        scalars: dict[str, float] = {}
        for name, type_name in types.items():
            if type_name == "float":
                scalars[name] = _finite(name, defaults[name])
            elif type_name == "per_expert":
                values = _per_expert_values(name, defaults[name], signature.slots)
                scalars |= zip(signature.per_expert_names(name), values, strict=True)
        return cls(
            requests=tuple(requests),
            scalars=dict(sorted(scalars.items())),
            per_expert=tuple(name for name in types if types[name] == "per_expert"),
            static=_static_values(types, defaults, signature),
        )

    def keywords(self, inputs: Mapping[str, Any], signature: MergeSignature) -> dict[str, Any]:
        """Return the keyword arguments of the candidate.

        Args:
            inputs: all optional inputs and scalars, by name.
            signature: names the experts.
        """
        single = [name for name in self.scalars if "." not in name]
        each = {
            name: {
                slot: inputs[scalar]
                for slot, scalar in zip(
                    signature.slots, signature.per_expert_names(name), strict=True
                )
            }
            for name in self.per_expert
        }
        return {**{name: inputs[name] for name in (*self.requests, *single)}, **each, **self.static}


def _refuse(message: str, rule: str = "signature") -> Refusal:
    return Refusal("refused", rule, message)


def _parameters(function: Callable) -> list[inspect.Parameter]:
    """Return the parameters after the task vectors, with annotations looked up."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise _refuse("the signature of the function cannot be read") from None
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise _refuse("the first parameter must be the dict of task vectors")
    for parameter in parameters[1:]:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            inputs = ", ".join(REQUESTS)
            raise _refuse(
                f"`{parameter}` is not allowed; name the inputs that are needed ({inputs}) and"
                " the hyperparameters, with defaults"
            )
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise _refuse(f"the parameter `{parameter.name}` must accept a keyword argument")
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    return [
        parameter.replace(annotation=_resolved(parameter.annotation, scope))
        for parameter in parameters[1:]
    ]


def _resolved(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """Look up an annotation that is a string, as under `from __future__ import annotations`.

    Text of a candidate is never evaluated: neither the text rules nor the step budget would apply.
    All types that a hyperparameter can have are names or members of modules; anything else is
    returned as it is, so that the parameter keeps its default.
    """
    if not isinstance(annotation, str):
        return annotation
    first, *members = annotation.strip().split(".")
    value = scope.get(first, _BUILTIN_TYPES.get(first, annotation))
    for member in members:
        if not isinstance(value, ModuleType):
            return annotation
        value = getattr(value, member, None)
    return value


def _type_of(parameter: inspect.Parameter) -> str | None:
    """Return the type of a hyperparameter; None if the parameter only keeps its default."""
    name, default = parameter.name, parameter.default
    try:
        type_name = hyperparameter_type("", parameter)
        if type_name in ("bool", "int", "str"):
            check_value("", name, type_name, default)
    except UserError:
        return None
    return type_name


def _finite(name: str, default: Any) -> float:
    if type(default) not in (int, float) or not abs(default) <= MAX_FLOAT32:
        raise _refuse(f"the default of `{name}: float` must be a finite number")
    return float(default)


def _per_expert_values(name: str, default: Any, slots: Sequence[str]) -> list[float]:
    expected = f"the default of `{name}: PerExpert` must be a finite number, or one per expert"
    try:
        value = check_value("", name, "per_expert", default)
    except UserError:
        raise _refuse(expected) from None
    if isinstance(value, Mapping):
        value = tuple(value[slot] for slot in slots) if set(value) == set(slots) else ()
    values = [value] * len(slots) if isinstance(value, float) else list(value)
    if len(values) != len(slots):
        raise _refuse(f"{expected}: {', '.join(slots)}")
    return [_finite(name, number) for number in values]


def _static_values(
    types: Mapping[str, str], defaults: Mapping[str, Any], signature: MergeSignature
) -> dict[str, bool | int | str]:
    """Check all hyperparameters that the user has set; return those that are not traced."""
    listed = ", ".join(
        f"{name}: {_TYPE_NAMES.get(type_name, type_name)} = {defaults[name]!r}"
        for name, type_name in types.items()
    )
    static: dict[str, bool | int | str] = {}
    for name, value in signature.parameters:
        if name not in types:
            hint = did_you_mean(name, types, f"available: {listed or 'none'}")
            raise _refuse(f"no hyperparameter {name!r}; {hint}", "hyperparameter")
        is_static = types[name] in ("bool", "int", "str")
        if value is None:
            if is_static:
                problem = f"hyperparameter {name!r} has a single value for the whole merge"
                raise _refuse(f"{problem}; available: {listed}", "hyperparameter")
            continue
        try:
            checked = check_value("program", name, types[name], value)
        except UserError as error:
            problem = str(error).removeprefix("program: ")
            raise _refuse(f"{problem}; available: {listed}", "hyperparameter") from None
        if is_static:
            static[name] = checked
    return static
