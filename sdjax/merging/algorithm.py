"""The algorithm API: one way to write a merge method, for machines and for people.

A method is one plain function. The *tensor* form is called once for each tensor of the model::

    def merge_models(task_vectors, base, key, depth, kind, weight: PerExpert = 1.0,
                     scale: float = 1.0, normalize: bool = False):
        ...
        return merged_task_vector          # float32, the tensor's shape

``task_vectors`` is a dict from expert to that expert's task vector (expert minus base, float32, the
tensor's shape [out, in]), in slot order. Everything else is asked for by naming it:

``base``   the base model's tensor, float32
``key``    a typed PRNG key of this tensor, the same whatever the order, the sharding or the device
``depth``  float32 scalar *array*: the layer's place in [0, 1], -1 outside the layers
``kind``   Python string such as ``"mlp.down_proj"``; branching on it is allowed

Any other parameter needs a default and is a **hyperparameter**:

* annotated ``float``: arrives as a float32 scalar array, so that a sweep over it compiles nothing;
* annotated ``PerExpert``: arrives as a dict from expert to a float32 scalar array. It is set by one
  number (the same for every expert), by a sequence in slot order, or by a mapping from expert to
  number; all three run the same compiled program. This is what a recipe's ``weight`` and
  ``density`` of each model become;
* anything else (``bool``, ``int``, ``str``): a Python value, part of the algorithm's identity.

The *tree* form is called once for the whole scope, for statistics across tensors. The function is
named ``merge_trees``; each task vector is then a flat dict from tensor path to tensor, as is
``base``, ``key`` is one key, and ``depth`` and ``kind`` do not exist.

What the task vectors are relative to is the caller's choice: in a search, and in a recipe with a
base, the base model; in a recipe without one the base is zero and the "task vectors" are the
weights themselves. Methods work on what they are given.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import jax
import numpy as np

from sdjax.core.errors import UserError

Static = bool | int | str
Form = Literal["tensor", "tree"]

PerExpert = Annotated[Any, "a value for each expert"]
"""Annotation of a hyperparameter with a value for each expert; see the module's docstring."""

REQUESTS = frozenset({"base", "key", "depth", "kind"})
TREE_REQUESTS = frozenset({"base", "key"})

_numbers: weakref.WeakKeyDictionary[Callable, int] = weakref.WeakKeyDictionary()
_counted: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True, eq=False)
class Algorithm:
    """A merge method with its hyperparameters bound.

    identity: two algorithms of equal identity trace to the same program; the values of traced
        hyperparameters (``traced``) are no part of it.
    requests: which of "base", "key", "depth", "kind" the function takes.
    traced: hyperparameters that are arguments of the compiled program, by how they arrive.
    """

    name: str
    identity: str
    form: Form
    function: Callable[..., Any]
    requests: frozenset[str]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    traced: Mapping[str, Literal["float", "per_expert"]] = field(default_factory=dict)

    @classmethod
    def from_function(
        cls, function: Callable[..., Any], *, name: str | None = None, **hyperparameters: Any
    ) -> Algorithm:
        """Read a function of the algorithm API, and bind its hyperparameters.

        The form is "tree" if the function (or ``function.__name__``) is ``merge_trees``, else
        "tensor". Raises UserError for a signature outside the API and for a hyperparameter that
        does not exist or has a wrong type.
        """
        title = name or function.__name__
        form: Form = "tree" if function.__name__ == "merge_trees" else "tensor"
        signature = read_signature(function, title, form)
        bound = dict(signature.defaults)
        for key, value in hyperparameters.items():
            bound[key] = _checked(title, signature.annotations, bound, key, value)
        return cls(
            name=title,
            identity=_identity(function, bound, signature.traced),
            form=form,
            function=function,
            requests=signature.requests,
            hyperparameters=bound,
            traced=signature.traced,
        )

    def bind(self, **hyperparameters: Any) -> Algorithm:
        """The same algorithm with other values; traced ones keep the identity and the program."""
        if not hyperparameters:
            return self
        if set(hyperparameters) <= set(self.traced):
            bound = dict(self.hyperparameters)
            for key, value in hyperparameters.items():
                bound[key] = _checked(self.name, self.traced, bound, key, value)
            return replace(self, hyperparameters=bound)
        unknown = set(hyperparameters) - set(self.hyperparameters)
        if unknown:
            _unknown(self.name, sorted(unknown)[0], self.hyperparameters)
        bound = {**self.hyperparameters, **hyperparameters}
        return Algorithm.from_function(self.function, name=self.name, **bound)

    @property
    def static(self) -> dict[str, Static]:
        """The hyperparameters that are Python values inside the trace."""
        return {k: v for k, v in self.hyperparameters.items() if k not in self.traced}

    def arguments(self, slots: Sequence[str]) -> dict[str, np.ndarray | np.float32]:
        """The traced hyperparameters as arrays: float32 scalars, and [experts] for PerExpert.

        Raises UserError when a PerExpert value does not fit the slots.
        """
        out: dict[str, np.ndarray | np.float32] = {}
        for key, how in self.traced.items():
            value = self.hyperparameters[key]
            if how == "per_expert":
                out[key] = _per_expert(self.name, key, value, slots)
            else:
                out[key] = np.float32(value)
        return out

    def call(
        self,
        slots: Sequence[str],
        task_vectors: Sequence[Any],
        arguments: Mapping[str, jax.Array],
        requested: Mapping[str, Any],
    ) -> Any:
        """Run the function (inside a trace): ``task_vectors`` and ``arguments`` in slot order."""
        keywords: dict[str, Any] = dict(self.static)
        for key, value in arguments.items():
            if self.traced[key] == "per_expert":
                keywords[key] = {slot: value[i] for i, slot in enumerate(slots)}
            else:
                keywords[key] = value
        keywords.update({r: requested[r] for r in self.requests})
        return self.function(dict(zip(slots, task_vectors, strict=True)), **keywords)


@dataclass(frozen=True, kw_only=True)
class AlgorithmSignature:
    """What a function of the algorithm API asks for."""

    requests: frozenset[str]
    defaults: Mapping[str, Any]
    annotations: Mapping[str, str]  # hyperparameter -> "float", "per_expert", "bool", "int", "str"
    traced: Mapping[str, Literal["float", "per_expert"]]


def read_signature(function: Callable[..., Any], name: str, form: Form) -> AlgorithmSignature:
    """Inspect a function of the algorithm API. Raises UserError for one outside it."""
    try:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    except (NameError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"{name}: the signature cannot be read ({error})") from error
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not parameters or parameters[0].kind in (*variadic, inspect.Parameter.KEYWORD_ONLY):
        raise UserError(f"{name}: the first parameter must be task_vectors, a dict from expert")
    allowed = REQUESTS if form == "tensor" else TREE_REQUESTS
    requests, defaults, annotations = set(), {}, {}
    for parameter in parameters[1:]:
        key = parameter.name
        if parameter.kind in variadic or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UserError(f"{name}: parameter {key!r} must be an ordinary named parameter")
        if key in REQUESTS:
            if key not in allowed:
                raise UserError(
                    f"{name}: {key!r} does not exist in the tree form; it may ask for "
                    f"{', '.join(sorted(allowed))}"
                )
            requests.add(key)
        elif parameter.default is inspect.Parameter.empty:
            raise UserError(
                f"{name}: parameter {key!r} is no request ({', '.join(sorted(allowed))}) and has "
                "no default; give it one to make it a hyperparameter"
            )
        else:
            annotations[key] = _annotation(name, key, parameter)
            defaults[key] = _valid(name, annotations, key, parameter.default)
    traced = {k: a for k, a in annotations.items() if a in ("float", "per_expert")}
    return AlgorithmSignature(
        requests=frozenset(requests),
        defaults=defaults,
        annotations=annotations,
        traced=traced,  # type: ignore[arg-type]
    )


def _annotation(name: str, key: str, parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if annotation == PerExpert:
        return "per_expert"
    if annotation is inspect.Parameter.empty:
        annotation = type(parameter.default)
        if annotation is float:
            raise UserError(
                f"{name}: annotate hyperparameter {key!r}: `{key}: float` arrives as an array and "
                "can be swept, `PerExpert` has a value for each expert"
            )
    if annotation in (float, bool, int, str):
        return annotation.__name__
    raise UserError(
        f"{name}: hyperparameter {key!r} must be annotated float, PerExpert, bool, int or str"
    )


def _unknown(name: str, key: str, known: Mapping[str, Any]) -> None:
    has = ", ".join(known) or "none"
    raise UserError(f"{name}: no hyperparameter {key!r}; it has: {has}")


def _checked(
    name: str, annotations: Mapping[str, str], bound: Mapping[str, Any], key: str, value: Any
) -> Any:
    if key not in bound:
        _unknown(name, key, bound)
    return _valid(name, annotations, key, value)


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) or (
        isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    )
    return real and not isinstance(value, bool) and math.isfinite(float(value))


def _valid(name: str, annotations: Mapping[str, str], key: str, value: Any) -> Any:
    """The value of one hyperparameter as stored: float, tuple or dict of floats, or static."""
    how = annotations[key]
    good: Any = None
    if how == "float" and _is_number(value):
        return float(value)
    if how == "per_expert":
        if _is_number(value):
            return float(value)
        if isinstance(value, Mapping) and all(_is_number(v) for v in value.values()):
            return {str(k): float(v) for k, v in value.items()}
        many = not isinstance(value, str | Mapping) and hasattr(value, "__len__")
        if many and all(_is_number(v) for v in value):
            return tuple(float(v) for v in value)
    good = {"bool": bool, "int": int, "str": str}.get(how)
    if good and isinstance(value, good) and (good is not int or not isinstance(value, bool)):
        return value
    expected = {
        "float": "a finite number",
        "per_expert": "a finite number, a list of them in the experts' order, or expert: number",
        "bool": "true or false",
        "int": "a whole number",
        "str": "text",
    }[how]
    raise UserError(f"{name}: hyperparameter {key!r} must be {expected}, not {value!r}")


def _per_expert(name: str, key: str, value: Any, slots: Sequence[str]) -> np.ndarray:
    if isinstance(value, Mapping):
        if set(value) != set(slots):
            raise UserError(
                f"{name}: hyperparameter {key!r} names {', '.join(sorted(value))}; "
                f"the experts are {', '.join(slots)}"
            )
        return np.array([value[slot] for slot in slots], np.float32)
    if isinstance(value, tuple):
        if len(value) != len(slots):
            raise UserError(
                f"{name}: hyperparameter {key!r} has {len(value)} values for {len(slots)} experts"
            )
        return np.array(value, np.float32)
    return np.full(len(slots), value, np.float32)


def _identity(
    function: Callable[..., Any], bound: Mapping[str, Any], traced: Mapping[str, str]
) -> str:
    qualified = f"{function.__module__}.{function.__qualname__}"
    # A name is shared by closures, and by what a notebook defines again. The first function of a
    # name keeps it as it is: that of a module, whose identity must outlive the process.
    if function not in _numbers:
        _numbers[function] = _counted[qualified]
        _counted[qualified] += 1
    if number := _numbers[function]:
        qualified += f"#{number}"
    static = ", ".join(f"{k}={v!r}" for k, v in sorted(bound.items()) if k not in traced)
    return f"{qualified}({static})"
