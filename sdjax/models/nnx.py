"""Flax NNX modules that share their arrays with sdjax's parameter trees.

Axes: see `sdjax.models.types`.

Examples:
    >>> import jax.numpy as jnp
    >>> import sdjax
    >>> config, params = sdjax.load_model("zoo:seed")
    >>> module = to_nnx(config, params)
    >>> module(jnp.array([[5, 6, 7]])).shape == (1, 3, config.vocab_size)
    True
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.params import param_specs
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import AnyArray, Params


class Transformer(nnx.Module):
    """Decoder-only transformer with its parameters as a nested dict of `nnx.Param`.

    Attributes:
        config: config of the model.
        params: nested dict with the paths of `param_specs` and an `nnx.Param` at each leaf.
    """

    def __init__(self, config: ModelConfig, params: Params):
        self.config = config
        leaves = {path: nnx.Param(leaf) for path, leaf in flatten(params).items()}
        self.params = nnx.data(unflatten(leaves))

    def __call__(
        self,
        tokens: Int[AnyArray, "batch time"],
        *,
        positions: Int[AnyArray, "batch time"] | None = None,
        segments: Int[AnyArray, "batch time"] | None = None,
    ) -> Float[Array, "batch time vocab"]:
        """Return the float32 logits of the next token at each position.

        Args:
            tokens: token ids.
            positions: position of each token in its sequence; 0, 1, ... by default.
            segments: sequence number of each token in packed rows, or None.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        params = _arrays(self)
        hidden, _ = forward(
            params, None, tokens, config=self.config, positions=positions, segments=segments
        )
        return unembed(params, hidden, config=self.config)


def to_nnx(config: ModelConfig, params: Params) -> Transformer:
    """Return a Flax NNX module that holds the arrays of `params`, not copies.

    Args:
        config: config of the model.
        params: nested dict of arrays with the paths and shapes of `param_specs(config)`.

    Raises:
        UserError: a leaf is missing, unexpected or has the wrong shape.

    Examples:
        >>> from sdjax.testing import tiny_model
        >>> config, params = tiny_model()
        >>> to_nnx(config, params).params["embed"].shape
        (64, 16)
    """
    leaves, specs = flatten(params), param_specs(config)
    mismatched = sorted(specs.keys() ^ leaves.keys())
    if mismatched:
        problem = "missing" if mismatched[0] in specs else "unexpected"
        raise UserError(
            f"to_nnx: the leaf {mismatched[0]} is {problem}; pass the complete parameters of this "
            "config"
        )
    for path, leaf in leaves.items():
        if tuple(leaf.shape) != specs[path].shape:
            raise UserError(
                f"to_nnx: {path} has shape {list(leaf.shape)}, not {list(specs[path].shape)}; "
                "pass parameters that belong to this config"
            )
    return Transformer(config, params)


def from_nnx(module: Transformer) -> tuple[ModelConfig, Params]:
    """Return the config and the parameter tree of a module, sharing its arrays.

    Examples:
        >>> from sdjax.testing import tiny_model
        >>> config, params = tiny_model()
        >>> restored_config, restored = from_nnx(to_nnx(config, params))
        >>> restored_config == config, restored["embed"] is params["embed"]
        (True, True)
    """
    return module.config, _arrays(module)


def _arrays(module: Transformer) -> Params:
    leaves: dict[str, nnx.Param[jax.Array]] = flatten(module.params)
    return unflatten({path: param.get_value() for path, param in leaves.items()})
