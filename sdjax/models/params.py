"""One specification a parameter: shapes, shardings, initialisation, loading and saving follow it.

Logical axes: vocab, embed (the residual stream), heads and kv_heads (times head_dim), head (one
head's dimensions), mlp; qkv and gate_up of fused projections.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.models.families import Family
from sdjax.models.tree import unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One tensor of a model, in Hugging Face's orientation [out, in].

    start: the value that a vector is initialised with; matrices are drawn.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    start: float = 0.0


# Every tensor that a layer of some family has: our name, Hugging Face's name, the logical axes.
LAYER_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn/q_proj": ("self_attn.q_proj.weight", ("heads", "embed")),
    "attn/k_proj": ("self_attn.k_proj.weight", ("kv_heads", "embed")),
    "attn/v_proj": ("self_attn.v_proj.weight", ("kv_heads", "embed")),
    "attn/qkv_proj": ("self_attn.qkv_proj.weight", ("qkv", "embed")),
    "attn/o_proj": ("self_attn.o_proj.weight", ("embed", "heads")),
    "attn/q_proj_bias": ("self_attn.q_proj.bias", ("heads",)),
    "attn/k_proj_bias": ("self_attn.k_proj.bias", ("kv_heads",)),
    "attn/v_proj_bias": ("self_attn.v_proj.bias", ("kv_heads",)),
    "attn/q_norm": ("self_attn.q_norm.weight", ("head",)),
    "attn/k_norm": ("self_attn.k_norm.weight", ("head",)),
    "mlp/gate_proj": ("mlp.gate_proj.weight", ("mlp", "embed")),
    "mlp/up_proj": ("mlp.up_proj.weight", ("mlp", "embed")),
    "mlp/gate_up_proj": ("mlp.gate_up_proj.weight", ("gate_up", "embed")),
    "mlp/down_proj": ("mlp.down_proj.weight", ("embed", "mlp")),
    "input_norm": ("input_layernorm.weight", ("embed",)),
    # Before the MLP, but where a family has sandwich norms: behind attention.
    "post_attn_norm": ("post_attention_layernorm.weight", ("embed",)),
    "pre_mlp_norm": ("pre_feedforward_layernorm.weight", ("embed",)),
    "post_mlp_norm": ("post_feedforward_layernorm.weight", ("embed",)),
}
OUTSIDE_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed": ("model.embed_tokens.weight", ("vocab", "embed")),
    "final_norm": ("model.norm.weight", ("embed",)),
    "lm_head": ("lm_head.weight", ("vocab", "embed")),
}


def layer_tensors(family: Family) -> tuple[str, ...]:
    """Which of `LAYER_TENSORS` a layer of this family has."""
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
    """Path to specification, for every parameter of the model."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "qkv": heads + 2 * kv_heads,
        "head": config.head_dim,
        "mlp": config.intermediate_size,
        "gate_up": 2 * config.intermediate_size,
    }
    unit = 0.0 if config.arch.zero_centered_norm else 1.0

    def spec(hf_name: str, axes: tuple[str, ...]) -> ParamSpec:
        shape = tuple(sizes[axis] for axis in axes)
        start = unit if "norm" in hf_name else 0.0
        return ParamSpec(shape=shape, axes=axes, hf_name=hf_name, start=start)

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


def kind_of(path: str) -> str:
    """The place of a tensor within its layer, such as `mlp.down_proj`; a closed list a family."""
    parts = path.split("/")
    return ".".join(parts[2:] if parts[0] == "layers" else parts)


def depth_of(path: str, num_layers: int) -> float:
    """The layer's place in [0, 1]; -1 for a tensor outside the layers."""
    parts = path.split("/")
    if parts[0] != "layers":
        return -1.0
    return int(parts[1]) / max(num_layers - 1, 1)


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> dict:
    """The nested dict of `jax.ShapeDtypeStruct`s of the model."""
    specs = param_specs(config)
    return unflatten({path: jax.ShapeDtypeStruct(s.shape, dtype) for path, s in specs.items()})


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype) -> dict:
    """Fresh parameters: norms scale by one, biases are zero, the rest is normal with a standard
    deviation of 0.02.

    The projections back into the residual stream are scaled by 1/sqrt(2 layers)
    (GPT-2, Radford et al. 2019), so that its variance does not grow with depth.
    """
    leaves = {}
    for index, (path, spec) in enumerate(param_specs(config).items()):
        if len(spec.shape) == 1:
            leaves[path] = jnp.full(spec.shape, spec.start, dtype)
            continue
        std = 0.02
        if kind_of(path) in ("attn.o_proj", "mlp.down_proj"):
            std /= math.sqrt(2 * config.num_layers)
        noise = jax.random.normal(jax.random.fold_in(key, index), spec.shape, jnp.float32)
        leaves[path] = (std * noise).astype(dtype)
    return unflatten(leaves)
