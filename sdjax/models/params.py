"""Parameter specifications, which initialization, sharding, loading and saving all follow.

Logical axes of parameters:

| axis | size |
|---|---|
| vocab | vocabulary |
| hidden | residual stream |
| heads, kv_heads | number of (key-value) heads times head_dim |
| head_dim | dimensions of one head |
| query_key_value | output of the fused attention projection |
| intermediate | MLP |
| gate_and_up | output of the fused MLP projection |
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from sdjax.models.config import ModelConfig
from sdjax.models.families import Family
from sdjax.models.tensor_names import LAYER_TENSORS as LAYER_TENSORS
from sdjax.models.tensor_names import OUTSIDE_TENSORS as OUTSIDE_TENSORS
from sdjax.models.tensor_names import kind_of as kind_of
from sdjax.models.tree import unflatten
from sdjax.models.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """Specification of one parameter, in Hugging Face's orientation [out, in].

    Attributes:
        shape: sizes of the dimensions.
        axes: logical axis of each dimension.
        hf_name: name in Hugging Face checkpoints.
        init_value: initial value of a vector; matrices are initialized randomly.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    init_value: float = 0.0


def layer_tensors(family: Family) -> tuple[str, ...]:
    """Return the names in `LAYER_TENSORS` of the tensors that a layer of the family has."""
    attention = ["qkv_proj"] if family.fused else ["q_proj", "k_proj", "v_proj"]
    mlp = ["gate_up_proj"] if family.fused else ["gate_proj", "up_proj"]
    if family.qkv_bias:
        attention += [f"{name}_bias" for name in attention]
    if family.qk_norm:
        attention += ["q_norm", "k_norm"]
    norms = ["input_norm", "post_attn_norm"]
    if family.sandwich_norms:
        norms += ["pre_mlp_norm", "post_mlp_norm"]
    return (
        *(f"attn/{name}" for name in (*attention, "o_proj")),
        *(f"mlp/{name}" for name in (*mlp, "down_proj")),
        *norms,
    )


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return the specification of every parameter, keyed and sorted by path.

    Examples:
        >>> from sdjax.testing import tiny_config
        >>> param_specs(tiny_config())["layers/0/mlp/up_proj"].shape
        (24, 16)
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "query_key_value": heads + 2 * kv_heads,
        "head_dim": config.head_dim,
        "intermediate": config.intermediate_size,
        "gate_and_up": 2 * config.intermediate_size,
    }
    norm_init = 0.0 if config.arch.zero_centered_norm else 1.0

    def spec(hf_name: str, axes: tuple[str, ...]) -> ParamSpec:
        shape = tuple(sizes[axis] for axis in axes)
        init_value = norm_init if "norm" in hf_name else 0.0
        return ParamSpec(shape=shape, axes=axes, hf_name=hf_name, init_value=init_value)

    specs = {
        name: spec(hf_name, axes)
        for name, (hf_name, axes) in OUTSIDE_TENSORS.items()
        if name != "lm_head" or not config.tie_embeddings
    }
    for layer in range(config.num_layers):
        for name in layer_tensors(config.arch):
            hf_name, axes = LAYER_TENSORS[name]
            specs[f"layers/{layer}/{name}"] = spec(f"model.layers.{layer}.{hf_name}", axes)
    return dict(sorted(specs.items()))


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """Return the model's parameters as `jax.ShapeDtypeStruct`s."""
    specs = param_specs(config)
    return unflatten({path: jax.ShapeDtypeStruct(s.shape, dtype) for path, s in specs.items()})


def init_params(config: ModelConfig, key: Key[Array, ""], dtype: DTypeLike) -> Params:
    """Return new parameters: norms start as the identity, biases at zero, matrices normal.

    The standard deviation of matrices is 0.02. Projections back into the residual stream are
    scaled by 1/sqrt(2 num_layers) (GPT-2, Radford et al. 2019), so that the variance of the
    residual stream does not grow with depth.

    Args:
        config: config of the model.
        key: typed PRNG key; a parameter's position in `param_specs` is folded in, so that another
            number of layers changes the values of all later parameters.
        dtype: dtype of the parameters.
    """
    leaves = {}
    for index, (path, spec) in enumerate(param_specs(config).items()):
        if len(spec.shape) == 1:
            leaves[path] = jnp.full(spec.shape, spec.init_value, dtype)
            continue
        std = 0.02
        if kind_of(path) in ("attn.o_proj", "mlp.down_proj"):
            std /= math.sqrt(2 * config.num_layers)
        noise = jax.random.normal(jax.random.fold_in(key, index), spec.shape, jnp.float32)
        leaves[path] = (std * noise).astype(dtype)
    return unflatten(leaves)
