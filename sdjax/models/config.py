"""Model config: everything that determines a model's shapes and mathematics."""

from __future__ import annotations

import dataclasses

from sdjax.models.families import FAMILIES, Family
from sdjax.models.rope import Rope

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Config of one decoder-only transformer; hashable, so it can be a static argument of `jit`.

    Attributes:
        family: name in `FAMILIES`.
        vocab_size: number of rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: number of transformer layers.
        num_heads: number of query heads.
        num_kv_heads: number of key-value heads; it divides `num_heads`.
        head_dim: dimensions per head.
        max_seq_len: maximum sequence length in tokens.
        rope: rotary position embedding.
        local_rope: rotary position embedding of sliding-window layers, or None for `rope`.
        norm_eps: epsilon of the RMS norms.
        tie_embeddings: whether the embedding is also the output projection.
        sliding_window: number of tokens, including itself, that a token attends to in
            sliding-window layers.
        layer_types: `SLIDING` or `FULL` for each layer; if empty, all layers use the sliding
            window, if there is one.
        query_pre_attn_scalar: attention scores are divided by its square root; None means
            `head_dim`.
        attn_logit_softcap: cap of the attention scores: cap * tanh(score / cap).
        final_logit_softcap: cap of the output logits.
        bos_token_id: start token.
        pad_token_id: padding token.
        eos_token_ids: tokens that end a sequence.
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
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def arch(self) -> Family:
        """Architecture that all models of the family share."""
        return FAMILIES[self.family]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, or None."""
        return tuple(
            self.sliding_window if self._is_sliding(layer) else None
            for layer in range(self.num_layers)
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Rotary position embedding of each layer."""
        return tuple(
            self.local_rope
            if self.local_rope is not None and self._is_sliding(layer)
            else self.rope
            for layer in range(self.num_layers)
        )

    def _is_sliding(self, layer: int) -> bool:
        return not self.layer_types or self.layer_types[layer] == SLIDING
