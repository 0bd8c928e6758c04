"""Description of the tensors that a program merges, against which it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from sdjax.merging.recipe.from_algorithm import MergeModels
from sdjax.merging.scope import Scope, select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tensor_names import parse_name
from sdjax.sandbox.config import Limits
from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor
from sdjax.sandbox.signature import MergeSignature
from sdjax.sharding.memory import memory_of


def model_signature(
    config: ModelConfig, slots: Sequence[str], scope: Scope, limits: Limits | None = None
) -> MergeSignature:
    """Return the merge signature of a model, without its weights.

    Equal arguments give equal signatures and therefore equal identities of candidates, in a run and
    in every command.

    Args:
        config: the model that is merged into.
        slots: names of the experts, in order.
        scope: tensors that are merged; see `sdjax.merging.scope`.
        limits: limits on a candidate; see `MergeSignature.of`.
    """
    specs = param_specs(config)
    tensors = {path: (kind_of(path), specs[path].shape) for path in select_paths(specs, scope)}
    return MergeSignature.of(slots, tensors, limits)


def merge_signature(
    models: MergeModels, scope: Scope, limits: Limits | None = None
) -> MergeSignature:
    """Return the merge signature of models on disk.

    Args:
        models: the models.
        scope: tensors that are merged; see `sdjax.merging.scope`.
        limits: limits on a candidate; see `MergeSignature.of`.
    """
    return MergeSignature.of(tuple(models.experts), models.tensors(scope), limits)


def merge_trial(
    models: MergeModels,
    scope: Scope,
    *,
    compiler: Literal["quick", "full", "single use"] = "single use",
) -> MergeTrial:
    """Return what a merge of models on disk compiles, for `Sandbox.try_merge`.

    Args:
        models: the models.
        scope: tensors that are merged.
        compiler: see `MergeTrial`; by default that of a merge from disk.
    """
    tensors, every = [], models.tensors(scope)
    for name, info in models.base.info.items():
        if (path := parse_name(name).path) in every:
            found = [expert.info.get(name, info) for expert in models.experts.values()]
            tensors.append(
                TrialTensor(
                    path=path,
                    shape=info.shape,
                    base=info.dtype.name,
                    experts=tuple(expert.dtype.name for expert in found),
                )
            )
    return MergeTrial(memory=memory_of(jax.devices()), tensors=tuple(tensors), compiler=compiler)
