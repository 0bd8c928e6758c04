"""The description of a model: everything that its shapes and its mathematics depend on."""

from __future__ import annotations

import dataclasses

from sdjax.models.families import FAMILIES, Family
from sdjax.models.rope import Rope

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of a family.

    Hashable, so that it can be a static argument of a compiled function.

    Attributes:
        family: a name in `FAMILIES`.
        max_seq_len: the most tokens of a sequence.
        rope: the rotation of queries and keys.
        local_rope: the rotation in layers with a window, or None: the same in all layers.
        sliding_window: how many tokens, itself included, a token attends to in such layers.
        layer_types: SLIDING or FULL for each layer; empty: all layers have the window, if any.
        query_size: scores are divided by its root; the head dimension if None.
        attention_cap: scores are cap · tanh(score / cap), if given.
        logit_cap: so are the logits.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    rope: Rope = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    query_pre_attn_scalar: int | None = None
    attn_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    bos_token: int | None = None
    pad_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    @property
    def arch(self) -> Family:
        """What the family has in common."""
        return FAMILIES[self.family]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, or None."""
        return tuple(
            self.sliding_window if self._slides(layer) else None for layer in range(self.num_layers)
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotation of each layer."""
        return tuple(
            self.local_rope if self.local_rope is not None and self._slides(layer) else self.rope
            for layer in range(self.num_layers)
        )

    def _slides(self, layer: int) -> bool:
        return not self.layer_types or self.layer_types[layer] == SLIDING
