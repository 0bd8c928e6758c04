"""Named types of models, and the axis names used in their jaxtyping annotations.

| axis | size |
|---|---|
| batch | sequences computed together |
| time | tokens of each sequence |
| keys | key positions that queries attend to |
| vocab | tokens of the vocabulary |
| hidden | width of the residual stream |
| heads, kv_heads | attention heads, key-value heads |
| head_dim | dimensions of one head |
| half_rotary | half of the rotated dimensions of one head |
| in, out | input and output width of a projection |
| rank | rank of a LoRA adapter |
| slots | sequences that a decoder computes at the same time |
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np

# Arrays that may still be on the host.
AnyArray: TypeAlias = jax.Array | np.ndarray

# Nested dict of arrays: {"embed": ..., "layers": {"0": {"attn": {"q_proj": ...}, ...}}, ...}.
# `param_specs` lists the paths, shapes and logical axes.
Params: TypeAlias = dict[str, Any]

# One dict per layer: "k" [batch kv_heads head_dim keys] and "v" [batch kv_heads keys head_dim].
KVCache: TypeAlias = list[dict[str, jax.Array]]
