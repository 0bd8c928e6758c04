"""Conversion of `ModelConfig` from and to Hugging Face's config.json.

Importing transformers' config classes takes seconds, so fields that a file omits are filled in from
`Family.defaults`, which a test compares with transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.models.config import FULL, SLIDING, ModelConfig
from sdjax.models.families import FAMILIES, Family
from sdjax.models.rope import SCALINGS, Rope

LOCAL_THETA = 10_000.0  # Gemma 3's default
# Far above any model's. Larger values would take memory and time before the weights disprove them.
_MAX_SIZE = 2**31 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_END_TOKENS = 1_000
_MAX_SIZES = {"num_hidden_layers": 10_000, "num_attention_heads": 2**16, "head_dim": 2**16}


def _integer(value: Any) -> int:
    if isinstance(value, bool | str) or int(value) != value:
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not abs(value) <= _MAX_FLOAT32:  # NaN is refused too
        raise TypeError
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(_number, value))


_NOUNS: dict[Callable[[Any], Any], str] = {
    _integer: "an integer",
    _number: "a number",
    _boolean: "true or false",
    _numbers: "a list of numbers",
}
# Rope parameters that earlier versions of transformers have next to `rope_scaling`.
_SHARED_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")
# Type of each field of the rope parameters that a scaling may read.
_ROPE_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        (
            *("rope_theta", "partial_rotary_factor", "factor", "attention_factor", "beta_fast"),
            *("beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"),
        ),
        _number,
    ),
    "original_max_position_embeddings": _integer,
    "short_factor": _numbers,
    "long_factor": _numbers,
    "truncate": _boolean,
}


def from_hf(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the `ModelConfig` of a config.json.

    Args:
        fields: content of the file.
        where: path of the file, for error messages.

    Raises:
        UserError: the architecture is not supported, or a field is missing, invalid or has an
            unsupported value.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {truncated_repr(name)} is not supported; use one of "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    fields = {**family.defaults, **fields}
    for key, supported in family.fixed.items():
        if fields.get(key) not in (None, supported):
            raise UserError(
                f"{where}: {key}={truncated_repr(fields[key])} is not supported; only "
                f"{supported!r} is"
            )

    def read(key: str, convert: Callable[[Any], Any], default: Any = None) -> Any:
        value = default if fields.get(key) is None else fields[key]
        if value is None:
            raise UserError(f"{where}: the required field {key!r} is missing; add it")
        converted = _convert(value, key, convert, where)
        limit = _MAX_SIZES.get(key, _MAX_SIZE)
        if convert is _integer and converted > limit:
            raise UserError(
                f"{where}: {key} must be at most {limit:,}, not {truncated_repr(value)}"
            )
        return converted

    def optional(key: str, convert: Callable[[Any], Any]) -> Any:
        return None if fields.get(key) is None else read(key, convert)

    heads, hidden, layers = (
        read(key, _integer) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    windowed = family.windows != "none" and fields.get("use_sliding_window") is not False
    max_seq_len = read("max_position_embeddings", _integer)
    rope, local_rope = _ropes(fields, family, where, max_seq_len=max_seq_len)
    config = ModelConfig(
        family=name,
        vocab_size=read("vocab_size", _integer),
        hidden_size=hidden,
        intermediate_size=read("intermediate_size", _integer),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read("num_key_value_heads", _integer, heads),
        head_dim=read("head_dim", _integer, hidden // max(heads, 1)),
        max_seq_len=max_seq_len,
        rope=rope,
        local_rope=local_rope,
        norm_eps=read("rms_norm_eps", _number, 1e-6),
        tie_embeddings=read("tie_word_embeddings", _boolean, False),
        sliding_window=optional("sliding_window", _integer) if windowed else None,
        layer_types=_layer_types(fields, family, layers, where) if windowed else (),
        query_pre_attn_scalar=optional("query_pre_attn_scalar", _integer),
        attn_logit_softcap=optional("attn_logit_softcapping", _number),
        final_logit_softcap=optional("final_logit_softcapping", _number),
        bos_token_id=optional("bos_token_id", _integer),
        pad_token_id=optional("pad_token_id", _integer),
        eos_token_ids=read_eos_token_ids(fields, where),
    )
    _check(config, where)
    return config


def _convert(value: Any, key: str, convert: Callable[[Any], Any], where: str) -> Any:
    """Return a field's value as its type; raise UserError if it has another one."""
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        noun, shown = _NOUNS[convert], truncated_repr(value)
        raise UserError(f"{where}: {key} must be {noun}, not {shown}") from None


def to_hf(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Return the fields of a config.json that transformers reads as the same model.

    Args:
        config: config of the model.
        dtype: name of the weights' dtype, such as "bfloat16".
    """
    family = config.arch
    eos: int | list[int] | None = list(config.eos_token_ids) or None
    if len(config.eos_token_ids) == 1:
        eos = config.eos_token_ids[0]
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
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
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
        # transformers before 4.53 reads this instead of `layer_types`.
        fields["max_window_layers"] = types.count(FULL)
    if "query_pre_attn_scalar" in family.defaults:
        fields["query_pre_attn_scalar"] = config.query_pre_attn_scalar
        fields["attn_logit_softcapping"] = config.attn_logit_softcap
        fields["final_logit_softcapping"] = config.final_logit_softcap
    return fields


def read_eos_token_ids(fields: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Return the field `eos_token_id`, an id, a list of ids or null, as a tuple.

    Negative ids, which stand for no token, are left out.

    Raises:
        UserError: the field is anything else, or has absurdly many or large ids.
    """
    eos = fields.get("eos_token_id")
    token_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(token_ids) > _MAX_END_TOKENS or not all(map(is_token_id, token_ids)):
        raise UserError(
            f"{where}: eos_token_id must be a token id or a list of token ids, "
            f"not {truncated_repr(eos)}"
        )
    return tuple(token_id for token_id in token_ids if token_id >= 0)


def is_token_id(value: Any) -> bool:
    """Return whether a value is a token id, or a negative number in place of one."""
    return type(value) is int and -_MAX_SIZE <= value <= _MAX_SIZE


def _layer_types(
    fields: Mapping[str, Any], family: Family, num_layers: int, where: str
) -> tuple[str, ...]:
    if family.windows == "all":
        return ()
    try:
        if fields.get("layer_types"):
            return tuple(map(str, fields["layer_types"]))
        if family.windows == "upper":
            num_full = _integer(fields["max_window_layers"])
            return tuple(FULL if layer < num_full else SLIDING for layer in range(num_layers))
        period = _integer(fields["sliding_window_pattern"])
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(num_layers))
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(
            f"{where}: layer_types, max_window_layers or sliding_window_pattern is invalid, so the "
            "layers with a sliding window are unknown; correct it"
        ) from None


def _ropes(
    fields: Mapping[str, Any], family: Family, where: str, *, max_seq_len: int
) -> tuple[Rope, Rope | None]:
    """Return the rotary embeddings of full-attention and of sliding-window layers.

    transformers 5 has all fields in `rope_parameters`, nested by layer type if the types differ.
    Earlier versions have `rope_theta` and the like next to `rope_scaling`, which takes precedence.
    """
    nested, scaling = (fields.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    sections = {"rope_parameters": nested, "rope_scaling": scaling}
    if family.local_rope and isinstance(nested, Mapping):
        sections |= {f"rope_parameters.{kind}": nested.get(kind) or {} for kind in (FULL, SLIDING)}
    for key, value in sections.items():
        if not isinstance(value, Mapping):
            shown = truncated_repr(value)
            raise UserError(f"{where}: {key} is {shown}; it must be a JSON object")
    if not family.local_rope:
        return _rope(scaling or nested, fields, family, where, max_seq_len=max_seq_len), None
    full = {**(nested.get(FULL) or {}), **scaling}
    theta = fields.get("rope_local_base_freq") or LOCAL_THETA
    local = {"rope_theta": theta, **(nested.get(SLIDING) or {})}
    return (
        _rope(full, fields, family, where, max_seq_len=max_seq_len),
        _rope(local, fields, family, where, max_seq_len=max_seq_len),
    )


def _rope(
    rope: Mapping[str, Any],
    fields: Mapping[str, Any],
    family: Family,
    where: str,
    *,
    max_seq_len: int,
) -> Rope:
    kind = rope.get("rope_type", rope.get("type")) or "default"
    kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ("default", *SCALINGS):
        raise UserError(
            f"{where}: rope type {truncated_repr(kind)} is not supported; use one of default, "
            f"{', '.join(SCALINGS)}"
        )
    original = fields.get("original_max_position_embeddings")
    if original is not None:
        rope = {**rope, "original_max_position_embeddings": original}
    shared = {key: fields.get(key) for key in _SHARED_ROPE_FIELDS if rope.get(key) is None}
    rope = {**rope, **shared}
    for key, convert in _ROPE_FIELDS.items():
        if rope.get(key) is not None:
            _convert(rope[key], f"the rope parameter {key}", convert, where)
    try:
        return Rope(
            theta=float(_first(rope["rope_theta"], 10_000.0)),
            partial=float(rope["partial_rotary_factor"] or 1.0),
            scaling=None if kind == "default" else SCALINGS[kind].from_hf(rope, max_seq_len),
        )
    except KeyError as missing:
        raise UserError(
            f"{where}: the rope parameters of type {kind!r} need the field {missing}; add it"
        ) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: the rope parameters must be numbers ({error})") from None


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the rope fields of both transformers 5 (`rope_parameters`) and earlier versions."""
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
            raise UserError(f"{where}: {key} must be at least 1, not {getattr(config, key)}")
    for key in ("query_pre_attn_scalar", "sliding_window"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"{where}: {key} must be at least 1, not {truncated_repr(value)}")
    for key in ("attn_logit_softcap", "final_logit_softcap"):
        value = getattr(config, key)
        if value is not None and value <= 0:
            raise UserError(f"{where}: {key} must be above 0, not {value}")
    if config.norm_eps < 0:
        raise UserError(f"{where}: norm_eps must be 0 or more, not {config.norm_eps}")
    if config.head_dim > _MAX_SIZES["head_dim"]:
        raise UserError(
            f"{where}: head_dim must be at most {_MAX_SIZES['head_dim']:,}, not {config.head_dim}"
        )
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{where}: {config.num_heads} attention heads are not divisible by "
            f"{config.num_kv_heads} key-value heads; correct num_key_value_heads"
        )
    invalid = set(config.layer_types) - {SLIDING, FULL}
    if invalid or (config.layer_types and len(config.layer_types) != config.num_layers):
        raise UserError(
            f"{where}: layer_types must list {SLIDING} or {FULL} for each of the "
            f"{config.num_layers} layers"
        )
    for rope in (config.rope, config.local_rope):
        if rope is None:
            continue
        if not 0 < rope.theta < math.inf:
            raise UserError(f"{where}: rope_theta must be above 0, not {rope.theta}")
        frequencies: list[np.ndarray] = []
        if 0 < rope.partial <= 1:
            # Suppressed: a list of factors of the wrong length, or factors that lead to no number.
            with contextlib.suppress(ValueError, ArithmeticError), np.errstate(all="ignore"):
                frequencies = [rope.frequencies(config.head_dim, n) for n in (1, sys.maxsize)]
        factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
        if not frequencies or not np.isfinite([*np.concatenate(frequencies), factor]).all():
            raise UserError(
                f"{where}: the rope parameters do not fit heads of {config.head_dim} dimensions; "
                "correct their values and the number of factors"
            )
