"""One specification a parameter: shapes, shardings, initialisation, loading and saving follow it.

Logical axes: vocab, embed (the residual stream), heads and kv_heads (times head_dim), mlp.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.models.tree import unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One tensor of a model, in Hugging Face's orientation [out, in]."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str

    @property
    def is_norm(self) -> bool:
        """Whether this is the scale of a normalisation, which starts at one."""
        return len(self.shape) == 1


# Per layer: our name, Hugging Face's name, and the logical axes.
LAYER_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn/q_proj": ("self_attn.q_proj", ("heads", "embed")),
    "attn/k_proj": ("self_attn.k_proj", ("kv_heads", "embed")),
    "attn/v_proj": ("self_attn.v_proj", ("kv_heads", "embed")),
    "attn/o_proj": ("self_attn.o_proj", ("embed", "heads")),
    "mlp/gate_proj": ("mlp.gate_proj", ("mlp", "embed")),
    "mlp/up_proj": ("mlp.up_proj", ("mlp", "embed")),
    "mlp/down_proj": ("mlp.down_proj", ("embed", "mlp")),
    "input_norm": ("input_layernorm", ("embed",)),
    "post_attn_norm": ("post_attention_layernorm", ("embed",)),
}


def specify(config: ModelConfig) -> dict[str, ParamSpec]:
    """Path to specification, for every parameter of the model."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
    }

    def spec(hf_name: str, axes: tuple[str, ...]) -> ParamSpec:
        return ParamSpec(
            shape=tuple(sizes[axis] for axis in axes), axes=axes, hf_name=f"{hf_name}.weight"
        )

    specs = {
        "embed": spec("model.embed_tokens", ("vocab", "embed")),
        "final_norm": spec("model.norm", ("embed",)),
    }
    if not config.tie_embeddings:
        specs["lm_head"] = spec("lm_head", ("vocab", "embed"))
    for layer in range(config.num_layers):
        for name, (hf_name, axes) in LAYER_TENSORS.items():
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


def abstract(config: ModelConfig, dtype: jnp.dtype) -> dict:
    """The nested dict of `jax.ShapeDtypeStruct`s of the model."""
    specs = specify(config)
    return unflatten({path: jax.ShapeDtypeStruct(s.shape, dtype) for path, s in specs.items()})


def initialise(config: ModelConfig, key: jax.Array, dtype: jnp.dtype) -> dict:
    """Fresh parameters: norms one, the rest normal with standard deviation 0.02.

    The projections back into the residual stream are scaled by 1/sqrt(2 layers)
    (GPT-2, Radford et al. 2019), so that its variance does not grow with depth.
    """
    leaves = {}
    for index, (path, spec) in enumerate(specify(config).items()):
        if spec.is_norm:
            leaves[path] = jnp.ones(spec.shape, dtype)
            continue
        std = 0.02
        if kind_of(path) in ("attn.o_proj", "mlp.down_proj"):
            std /= math.sqrt(2 * config.num_layers)
        noise = jax.random.normal(jax.random.fold_in(key, index), spec.shape, jnp.float32)
        leaves[path] = (std * noise).astype(dtype)
    return unflatten(leaves)
