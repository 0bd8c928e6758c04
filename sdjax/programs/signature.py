"""Merge signature of a model: which tensors a candidate of a search over it merges."""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.merging.scope import Scope, select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.params import kind_of, param_specs
from sdjax.sandbox.config import Limits
from sdjax.sandbox.signature import MergeSignature


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
