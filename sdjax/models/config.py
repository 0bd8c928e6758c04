"""The description of a model, read from and written to Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that the shapes and the mathematics of a model depend on.

    Hashable, so that it can be a static argument of a compiled function.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    sliding_window: int | None = None
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], where: str) -> ModelConfig:
        """Reads the fields of a config.json; `where` names the file in errors.

        Raises:
            UserError: an unsupported architecture, or a field that is missing or not supported.
        """
        family = fields.get("model_type")
        if family not in ARCHITECTURES:
            raise UserError(
                f"{where}: model_type {family!r} is not supported; "
                f"supported are {', '.join(sorted(ARCHITECTURES))}"
            )
        # transformers 5 moved rope_theta into rope_parameters, 4 wrote rope_scaling beside it.
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UserError(f"{where}: rope type {rope_type!r} is not supported; use 'default'")
        unsupported = {
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
        }
        for key, only in unsupported.items():
            if fields.get(key, only) != only:
                raise UserError(f"{where}: {key}={fields[key]!r} is not supported, only {only!r}")
        try:
            num_heads = int(fields["num_attention_heads"])
            hidden_size = int(fields["hidden_size"])
            eos = fields.get("eos_token_id")
            return cls(
                family=family,
                vocab_size=int(fields["vocab_size"]),
                hidden_size=hidden_size,
                intermediate_size=int(fields["intermediate_size"]),
                num_layers=int(fields["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(fields.get("num_key_value_heads") or num_heads),
                head_dim=int(fields.get("head_dim") or hidden_size // num_heads),
                context=int(fields["max_position_embeddings"]),
                rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
                norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
                sliding_window=fields.get("sliding_window") if family == "mistral" else None,
                bos_token=fields.get("bos_token_id"),
                eos_tokens=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            )
        except KeyError as missing:
            raise UserError(
                f"{where}: the field {missing} is missing; a Hugging Face config has it"
            ) from None

    def to_hf(self, *, dtype: str) -> dict[str, Any]:
        """The fields of a config.json that transformers reads as the same model."""
        eos: int | list[int] | None = list(self.eos_tokens) or None
        if len(self.eos_tokens) == 1:
            eos = self.eos_tokens[0]
        fields: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            # Both spellings: transformers 5 reads the first, everything older the second.
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token,
            "eos_token_id": eos,
            "dtype": dtype,
        }
        if self.family == "mistral":
            fields["sliding_window"] = self.sliding_window
        return fields
