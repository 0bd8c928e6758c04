"""The same model as a Flax NNX module, for those who live in Flax.

The module's state holds the very arrays of the nested dict, under the same names.

Axes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.params import param_specs
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten, unflatten


class Transformer(nnx.Module):
    """A decoder-only transformer whose parameters are a nested dict of `nnx.Param`.

    Attributes:
        config: the description.
        params: nested dict as everywhere in sdjax, with an `nnx.Param` at each leaf.
    """

    def __init__(self, config: ModelConfig, params: dict):
        self.config = config
        leaves = {path: nnx.Param(leaf) for path, leaf in flatten(params).items()}
        self.params = nnx.data(unflatten(leaves))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] in float32 of tokens [B, T].

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32; 0, 1, ... by default.
            segments: [B, T] int32 of packed rows, or None.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        params = _plain(self)
        hidden, _ = forward(
            params, None, tokens, config=self.config, positions=positions, segments=segments
        )
        return unembed(params, hidden, config=self.config)


def to_nnx(config: ModelConfig, params: dict) -> Transformer:
    """The module of a model; its leaves are those of `params`, not copies.

    Raises:
        UserError: the leaves are not those that `config` describes.
    """
    leaves, specs = flatten(params), param_specs(config)
    odd = sorted(specs.keys() ^ leaves.keys())
    if odd:
        what = "missing" if odd[0] in specs else "surplus"
        raise UserError(f"to_nnx: {odd[0]} is {what}; give the whole tree of this config")
    for path, leaf in leaves.items():
        if tuple(leaf.shape) != specs[path].shape:
            raise UserError(
                f"to_nnx: {path} has shape {list(leaf.shape)}, not {list(specs[path].shape)}; "
                "give parameters that belong to this config"
            )
    return Transformer(config, params)


def from_nnx(module: Transformer) -> tuple[ModelConfig, dict]:
    """The description and the nested dict of arrays of a module, uncopied."""
    return module.config, _plain(module)


def _plain(module: Transformer) -> dict[str, Any]:
    leaves = flatten(module.params)
    return unflatten({path: param.get_value() for path, param in leaves.items()})
