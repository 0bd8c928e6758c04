"""The description of a model from and to Hugging Face's config.json.

Importing transformers' own configuration classes takes seconds; so what a file may omit is filled
in from `Family.defaults`, which a test compares with theirs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sdjax.core.errors import UserError
from sdjax.models.config import FULL, SLIDING, ModelConfig
from sdjax.models.families import FAMILIES, Family
from sdjax.models.rope import SCALINGS, Rope

LOCAL_THETA = 10_000.0  # Gemma 3's, where config.json does not say


def from_hf(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the fields of a config.json; `where` names the file in errors.

    Raises:
        UserError: an unsupported architecture, or a field that is missing or not supported.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    fields = {**family.defaults, **fields}
    for key, only in family.fixed.items():
        if fields.get(key) not in (None, only):
            raise UserError(f"{where}: {key}={fields[key]!r} is not supported, only {only!r}")

    def take(key: str, convert: Callable[[Any], Any], default: Any = None) -> Any:
        value = default if fields.get(key) is None else fields[key]
        if value is None:
            raise UserError(f"{where}: the field {key!r} is missing; a Hugging Face config has it")
        try:
            return convert(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{where}: {key} is {value!r}, which is no {convert.__name__}; correct it"
            ) from None

    def optional(key: str, convert: Callable[[Any], Any]) -> Any:
        return None if fields.get(key) is None else take(key, convert)

    heads, hidden, layers = (
        take(key, int) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    windowed = family.windows != "none" and fields.get("use_sliding_window") is not False
    rope, local_rope = _ropes(fields, family, where, context=take("max_position_embeddings", int))
    config = ModelConfig(
        family=name,
        vocab_size=take("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=take("intermediate_size", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=take("num_key_value_heads", int, heads),
        head_dim=take("head_dim", int, hidden // max(heads, 1)),
        max_seq_len=take("max_position_embeddings", int),
        rope=rope,
        local_rope=local_rope,
        norm_eps=take("rms_norm_eps", float, 1e-6),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        sliding_window=optional("sliding_window", int) if windowed else None,
        layer_types=_layer_types(fields, family, layers, where) if windowed else (),
        query_pre_attn_scalar=optional("query_pre_attn_scalar", int),
        attn_logit_softcap=optional("attn_logit_softcapping", float),
        final_logit_softcap=optional("final_logit_softcapping", float),
        bos_token=fields.get("bos_token_id"),
        pad_token=fields.get("pad_token_id"),
        eos_tokens=end_tokens(fields, where),
    )
    _check(config, where)
    return config


def to_hf(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The fields of a config.json that transformers reads as the same model."""
    family = config.arch
    eos: int | list[int] | None = list(config.eos_tokens) or None
    if len(config.eos_tokens) == 1:
        eos = config.eos_tokens[0]
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        **family.fixed,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **_rope_fields(config),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token,
        "pad_token_id": config.pad_token,
        "eos_token_id": eos,
        "dtype": dtype,
    }
    if family.windows != "none":
        fields["sliding_window"] = config.sliding_window
    if family.windows in ("upper", "cyclic"):
        types = [FULL if window is None else SLIDING for window in config.windows]
        fields["layer_types"] = types
    if family.windows == "upper":
        fields["use_sliding_window"] = config.sliding_window is not None
        # What transformers before 4.53 reads in place of `layer_types`.
        fields["max_window_layers"] = types.count(FULL)
    if "query_pre_attn_scalar" in family.defaults:
        fields["query_pre_attn_scalar"] = config.query_pre_attn_scalar
        fields["attn_logit_softcapping"] = config.attn_logit_softcap
        fields["final_logit_softcapping"] = config.final_logit_softcap
    return fields


def end_tokens(fields: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """`eos_token_id`, which may be one, several or null. Raises UserError for anything else."""
    eos = fields.get("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(one, int) for one in found):
        raise UserError(f"{where}: eos_token_id is {eos!r}; it must be one token or several")
    return tuple(found)


def _layer_types(
    fields: Mapping[str, Any], family: Family, layers: int, where: str
) -> tuple[str, ...]:
    if family.windows == "all":
        return ()
    try:
        if fields.get("layer_types"):
            return tuple(map(str, fields["layer_types"]))
        if family.windows == "upper":
            first = int(fields["max_window_layers"])
            return tuple(FULL if layer < first else SLIDING for layer in range(layers))
        every = int(fields["sliding_window_pattern"])
        return tuple(SLIDING if (layer + 1) % every else FULL for layer in range(layers))
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{where}: layer_types, max_window_layers or sliding_window_pattern does not say which "
            "layers have a window; correct it"
        ) from None


def _ropes(
    fields: Mapping[str, Any], family: Family, where: str, *, context: int
) -> tuple[Rope, Rope | None]:
    """The rotation, and that of the layers with a window.

    transformers 5 has all of it in `rope_parameters`, by kind of layer where kinds differ; before,
    `rope_theta` and the like stood beside `rope_scaling`, which still goes first.
    """
    nested, scaling = (fields.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for key, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {key} is {value!r}; it must be an object")
    if not family.local_rope:
        return _rope(scaling or nested, fields, family, where, context=context), None
    full = {**(nested.get(FULL) or {}), **scaling}
    theta = fields.get("rope_local_base_freq") or LOCAL_THETA
    local = {"rope_theta": theta, **(nested.get(SLIDING) or {})}
    return (
        _rope(full, fields, family, where, context=context),
        _rope(local, fields, family, where, context=context),
    )


def _rope(
    rope: Mapping[str, Any], fields: Mapping[str, Any], family: Family, where: str, *, context: int
) -> Rope:
    kind = rope.get("rope_type", rope.get("type")) or "default"
    kind = family.rope_aliases.get(kind, kind)
    if kind not in ("default", *SCALINGS):
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; supported are default, "
            f"{', '.join(SCALINGS)}"
        )
    original = fields.get("original_max_position_embeddings")
    if original is not None:
        rope = {**rope, "original_max_position_embeddings": original}
    try:
        return Rope(
            theta=float(_first(rope.get("rope_theta"), fields.get("rope_theta"), 10_000.0)),
            partial=float(
                rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
            ),
            scaling=None if kind == "default" else SCALINGS[kind].read(rope, context),
        )
    except KeyError as missing:
        raise UserError(
            f"{where}: the rope parameters of type {kind!r} lack {missing}; add it"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: rope parameters that are no numbers ({error})") from None


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: transformers 5 reads the first, everything older the others."""
    rope = _rope_dict(config.rope)
    fields: dict[str, Any] = {"rope_parameters": rope, "rope_theta": config.rope.theta}
    if config.local_rope is not None:
        fields["rope_parameters"] = {FULL: rope, SLIDING: _rope_dict(config.local_rope)}
        fields["rope_local_base_freq"] = config.local_rope.theta
    if config.rope.partial != 1:
        fields["partial_rotary_factor"] = config.rope.partial
    if config.rope.scaling is not None:
        fields["rope_scaling"] = rope
        if "original_max_position_embeddings" in rope:
            original = rope["original_max_position_embeddings"]
            fields["original_max_position_embeddings"] = original
    return fields


def _rope_dict(rope: Rope) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.partial != 1:
        fields["partial_rotary_factor"] = rope.partial
    if rope.scaling is None:
        return fields
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(rope.scaling).items()
    }
    return {**fields, "rope_type": rope.scaling.kind, **values}


def _check(config: ModelConfig, where: str) -> None:
    sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    for key in (*sizes, "intermediate_size", "max_seq_len"):
        if getattr(config, key) < 1:
            raise UserError(f"{where}: {key} is {getattr(config, key)}; it must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{where}: {config.num_heads} attention heads do not divide among "
            f"{config.num_kv_heads} key-value heads; correct num_key_value_heads"
        )
    odd = sorted(set(config.layer_types) - {SLIDING, FULL})
    if odd or (config.layer_types and len(config.layer_types) != config.num_layers):
        raise UserError(
            f"{where}: layer_types must be {config.num_layers} times {SLIDING} or {FULL}"
        )
    for rope in (config.rope, config.local_rope):
        if rope is None:
            continue
        if not 0 < rope.theta < math.inf:
            raise UserError(f"{where}: rope_theta is {rope.theta}; it must be above 0")
        try:
            turned = [rope.frequencies(config.head_dim, reach) for reach in (1, sys.maxsize)]
        except ValueError:  # as many factors as no head has dimensions
            turned = []
        if not turned or 2 * len(turned[0]) > config.head_dim:
            raise UserError(
                f"{where}: the rope parameters do not fit heads of {config.head_dim} dimensions; "
                "correct the number of factors"
            )
