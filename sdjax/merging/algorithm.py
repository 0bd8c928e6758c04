"""The algorithm API, in which people and language models write merge methods.

A method is a plain function. The *tensor form* is called once per tensor of the model::

    def merge_models(task_vectors, base, key, depth, kind, weight: PerExpert = 1.0,
                     scale: float = 1.0, normalize: bool = False):
        ...
        return merged_task_vector          # float32, the shape of the tensor

`task_vectors` is a dict from expert name to that expert's task vector (expert minus base, float32,
[out, in] like the tensor), in slot order. All other inputs are optional; a function requests them
by naming a parameter after them:

`base`   the base model's tensor, float32
`key`    a typed PRNG key for this tensor, independent of order, sharding and devices
`depth`  float32 scalar *array*: the position of the layer in [0, 1], -1 outside the layers
`kind`   Python string such as `"mlp.down_proj"`, on which the function may branch
`fisher`, `gram`, `input_norm`  dicts from expert name to a statistic of that expert on data
         (`sdjax.merging.statistics`); None for a tensor that has none

Any other parameter needs a default and is a **hyperparameter**:

* annotated `float`: arrives as a float32 scalar array, so a sweep does not recompile;
* annotated `PerExpert`: arrives as a dict from expert name to float32 scalar array. It is set by
  one number for all experts, by a sequence in slot order, or by a mapping from expert name to
  number; all three use the same executable. A recipe's per-model `weight` and `density` are passed
  this way;
* anything else (`bool`, `int`, `str`): a Python value that is part of the algorithm's identity.

The *tree form* is called once for the whole scope and can use statistics across tensors. Its
function is named `merge_trees`. Each task vector, and `base`, is a flat dict from canonical path
(`layers/3/mlp/down_proj`, also if the model has Hugging Face's names) to tensor; `key` is a single
key; `depth` and `kind` are not available.

The caller chooses what the task vectors are relative to: the base model in a search and in a recipe
with a base; zero in a recipe without one, so that the "task vectors" are the weights themselves.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError, did_you_mean, truncated_repr
from sdjax.merging.schedule import has_schedules, resolve_schedules
from sdjax.merging.signature import Constraints, Form, TracedType, check_value, read_signature
from sdjax.merging.signature import PerExpert as PerExpert
from sdjax.merging.signature import TaskVectors as TaskVectors
from sdjax.merging.signature import Tensor as Tensor

StaticValue = bool | int | str

_function_numbers: weakref.WeakKeyDictionary[Callable, int] = weakref.WeakKeyDictionary()
_functions_per_name: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True, eq=False)
class Algorithm:
    """A merge method with bound hyperparameters.

    Attributes:
        name: name in error messages and reports.
        identity: algorithms with the same identity trace to the same computation; values of traced
            hyperparameters are not part of it.
        form: "tensor" or "tree".
        function: the function of the algorithm API.
        requests: the optional inputs that the function takes: "base", "key", "depth", "kind",
            "fisher", "gram", "input_norm".
        hyperparameters: name to value; in place of a number, there may be a `Schedule` of numbers
            that differ between tensors.
        traced: hyperparameters that are arguments of the executable, with their types.
        constraints: conditions on the hyperparameters besides their types.
    """

    name: str
    identity: str
    form: Form
    function: Callable[..., Any]
    requests: frozenset[str]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    traced: Mapping[str, TracedType] = field(default_factory=dict)
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        self.constraints.check(self.name, self.hyperparameters)

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        constraints: Constraints | None = None,
        **hyperparameters: Any,
    ) -> Algorithm:
        """Wrap a function of the algorithm API and bind its hyperparameters.

        Args:
            function: the function; it has the tree form if its name is `merge_trees`.
            name: name of the algorithm; by default the function's.
            constraints: conditions on the hyperparameters besides their types.
            **hyperparameters: values that override the function's defaults.

        Raises:
            UserError: the signature does not follow the API, or a hyperparameter does not exist or
                has the wrong type.
        """
        title = name or function.__name__
        form: Form = "tree" if function.__name__ == "merge_trees" else "tensor"
        signature = read_signature(function, title, form)
        values = {
            **signature.defaults,
            **_checked_values(title, signature.types, signature.defaults, hyperparameters),
        }
        return cls(
            name=title,
            identity=_identity(function, values, signature.traced),
            form=form,
            function=function,
            requests=signature.requests,
            hyperparameters=values,
            traced=signature.traced,
            constraints=constraints or Constraints(),
        )

    def bind(self, **hyperparameters: Any) -> Algorithm:
        """Return this algorithm with other hyperparameters.

        The identity, and with it the executable, changes only with hyperparameters that are not
        traced.

        Raises:
            UserError: a hyperparameter does not exist or has the wrong type.
        """
        if not hyperparameters:
            return self
        if set(hyperparameters) <= set(self.traced):
            values = _checked_values(self.name, self.traced, self.hyperparameters, hyperparameters)
            return replace(self, hyperparameters={**self.hyperparameters, **values})
        return Algorithm.from_function(
            self.function,
            name=self.name,
            constraints=self.constraints,
            **{**self.hyperparameters, **hyperparameters},
        )

    def at(self, name: str, depth: float) -> Algorithm:
        """Return the algorithm for one tensor, with its schedules resolved.

        Args:
            name: the tensor's name in a checkpoint.
            depth: relative depth of its layer; below 0 outside the layers.
        """
        values = resolve_schedules(self.hyperparameters, name, depth)
        return self if values is None else replace(self, hyperparameters=values)

    @property
    def is_scheduled(self) -> bool:
        """Whether a hyperparameter differs between tensors."""
        return has_schedules(self.hyperparameters)

    @property
    def static(self) -> dict[str, StaticValue]:
        """Return the hyperparameters that are Python values during tracing."""
        return {k: v for k, v in self.hyperparameters.items() if k not in self.traced}

    def hyperparameter_arrays(self, slots: Sequence[str]) -> dict[str, Any]:
        """Return the traced hyperparameters as float32: scalars, or [experts] for PerExpert.

        Args:
            slots: the names of the experts, in order.

        Raises:
            UserError: a PerExpert value does not match the experts.
        """
        return {
            key: _per_expert_array(self.name, key, self.hyperparameters[key], slots)
            if type_name == "per_expert"
            else _float32(self.hyperparameters[key])
            for key, type_name in self.traced.items()
        }

    def check_key(self, key: object) -> None:
        """Check the key of a merge.

        Raises:
            UserError: the algorithm requests a key, and this is not a concrete typed PRNG key.
        """
        if "key" not in self.requests:
            return
        if key is None:
            raise UserError(
                f"{self.name} draws random numbers; pass a key such as jax.random.key(0)"
            )
        typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if not (isinstance(key, jax.Array) and typed and key.shape == ()):
            found = truncated_repr(key)
            if isinstance(key, jax.Array | np.ndarray):
                found = f"an array {key.dtype}{list(key.shape)}"
            raise UserError(
                f"key must be one typed PRNG key such as jax.random.key(0), not {found}"
            )
        if isinstance(key, jax.core.Tracer):
            raise UserError(
                f"{self.name}: the key must not be traced; create it outside of the function that "
                "is compiled or transformed"
            )

    def call(
        self,
        slots: Sequence[str],
        task_vectors: Sequence[Any],
        hyperparameters: Mapping[str, jax.Array],
        optional_inputs: Mapping[str, Any],
    ) -> Any:
        """Call the function, inside a trace.

        Args:
            slots: the names of the experts.
            task_vectors: one tensor (or flat dict of tensors) per expert, in slot order.
            hyperparameters: the arrays of `hyperparameter_arrays`.
            optional_inputs: values of "base", "key", "depth", "kind" and the statistics; those that
                the function does not request are ignored.
        """
        keywords: dict[str, Any] = dict(self.static)
        for key, value in hyperparameters.items():
            if self.traced[key] == "per_expert":
                keywords[key] = {slot: value[i] for i, slot in enumerate(slots)}
            else:
                keywords[key] = value
        keywords.update({name: optional_inputs[name] for name in self.requests})
        return self.function(dict(zip(slots, task_vectors, strict=True)), **keywords)


def _checked_values(
    name: str, types: Mapping[str, str], defaults: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    for key in values:
        if key not in defaults:
            available = f"available: {', '.join(defaults) or 'none'}"
            hint = did_you_mean(key, defaults, available)
            raise UserError(f"{name}: no hyperparameter {key!r}; {hint}")
    return {key: check_value(name, key, types[key], value) for key, value in values.items()}


def _float32(value: Any) -> np.float32 | jax.Array:
    traced = isinstance(value, jax.core.Tracer)
    return jnp.asarray(value, jnp.float32) if traced else np.float32(value)


def _per_expert_array(
    name: str, key: str, value: Any, slots: Sequence[str]
) -> np.ndarray | jax.Array:
    if isinstance(value, Mapping):
        if set(value) != set(slots):
            raise UserError(
                f"{name}: hyperparameter {key!r} names {', '.join(sorted(value))}; "
                f"the experts are {', '.join(slots)}"
            )
        value = tuple(value[slot] for slot in slots)
    elif isinstance(value, tuple):
        if len(value) != len(slots):
            raise UserError(
                f"{name}: hyperparameter {key!r} has {len(value)} values for {len(slots)} experts"
            )
    else:
        value = (value,) * len(slots)
    if any(isinstance(number, jax.core.Tracer) for number in value):
        return jnp.stack([jnp.asarray(number, jnp.float32) for number in value])
    return np.array(value, np.float32)


def _identity(
    function: Callable[..., Any], values: Mapping[str, Any], traced: Mapping[str, str]
) -> str:
    qualified = f"{function.__module__}.{function.__qualname__}"
    # Closures share a name, as do functions that a notebook defines twice. Only the first function
    # with a given name keeps it unchanged: that is the one in a module, whose identity must be the
    # same in every process.
    if function not in _function_numbers:
        _function_numbers[function] = _functions_per_name[qualified]
        _functions_per_name[qualified] += 1
    if number := _function_numbers[function]:
        qualified += f"#{number}"
    static = ", ".join(f"{k}={v!r}" for k, v in sorted(values.items()) if k not in traced)
    return f"{qualified}({static})"
