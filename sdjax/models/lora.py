"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): y = x Wᵀ + (alpha / rank) (x Aᵀ) Bᵀ.

Axes: see `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.sharding.rules import sharding_of

ALL_PROJECTIONS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.qkv_proj",
    "attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank factors of a LoRA adapter.

    Attributes:
        factors: nested dict with the structure of the parameters; each adapted projection is a
            dict of `a` [rank in] and `b` [out rank], both float32.
        scale: alpha / rank.
    """

    factors: Params
    scale: float = dataclasses.field(metadata={"static": True})


def init_adapter(
    config: ModelConfig,
    key: Key[Array, ""],
    *,
    rank: int,
    alpha: float,
    target_modules: Collection[str] = ALL_PROJECTIONS,
) -> Adapter:
    """Return a new adapter that leaves the model unchanged: A is uniform as in PEFT, B is zero.

    Args:
        config: config of the model to adapt.
        key: typed PRNG key; a parameter's position in `param_specs` is folded in, so that its
            factor does not depend on `target_modules`.
        rank: rank of the factors.
        alpha: the product of the factors is scaled by alpha / rank.
        target_modules: kinds of projections to adapt, as returned by `kind_of`.

    Raises:
        UserError: the rank exceeds min(out, in) of every adapted projection.
    """
    specs = param_specs(config)
    adapted = [min(specs[path].shape) for path in specs if kind_of(path) in target_modules]
    if adapted and rank > max(adapted):
        raise UserError(
            f"rank is {rank}, but no adapted projection has a rank above {max(adapted)}; lower rank"
        )
    factors = {}
    for index, (path, spec) in enumerate(specs.items()):
        if kind_of(path) not in target_modules:
            continue
        out_size, in_size = spec.shape
        bound = in_size**-0.5
        a_key = jax.random.fold_in(key, index)
        factors[f"{path}/a"] = jax.random.uniform(
            a_key, (rank, in_size), jnp.float32, -bound, bound
        )
        factors[f"{path}/b"] = jnp.zeros((out_size, rank), jnp.float32)
    return Adapter(factors=unflatten(factors), scale=alpha / rank)


def shard_adapter(adapter: Adapter, config: ModelConfig, mesh: Mesh) -> Adapter:
    """Return the adapter on a mesh, each factor sharded like its projection.

    The rank axis is replicated. With several processes, each of them passes the same adapter and
    keeps its own shards.
    """
    specs = param_specs(config)
    sharded = {}
    for path, leaf in flatten(adapter.factors).items():
        projection, factor = path.rsplit("/", 1)
        out_axis, in_axis = specs[projection].axes
        axes = ("rank", in_axis) if factor == "a" else (out_axis, "rank")
        sharded[path] = jax.make_array_from_callback(
            leaf.shape, sharding_of(leaf.shape, axes, mesh), np.asarray(leaf).__getitem__
        )
    return dataclasses.replace(adapter, factors=unflatten(sharded))


def merge_lora(params: Params, adapter: Adapter) -> Params:
    """Return the parameters with the adapter's low-rank updates added, computed in float32."""
    leaves = flatten(params)
    factors = flatten(adapter.factors)
    for path in sorted({path.rsplit("/", 1)[0] for path in factors}):
        delta = factors[f"{path}/b"] @ factors[f"{path}/a"]  # [out in]
        weight = leaves[path]
        leaves[path] = (weight.astype(jnp.float32) + adapter.scale * delta).astype(weight.dtype)
    return unflatten(leaves)
