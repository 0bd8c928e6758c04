"""Provenance of a run's numbers: versions, weights, tokenizer and problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes
from sdjax.core.versions import UNKNOWN, changed_versions
from sdjax.io.hf_checkpoint import ASSETS
from sdjax.io.tokenizer import Tokenizer
from sdjax.models.fingerprint import fingerprint, text_fingerprint
from sdjax.search.context import RunContext, ScoringContext
from sdjax.search.plan import RunPlan, ScoringPlan
from sdjax.search.types import MAIN, Change


def run_inputs(context: ScoringContext) -> dict[str, str]:
    """Return the fingerprint of each input of a run, by name.

    Fingerprints of weights are those of the loaded arrays, so a copied or renamed folder is the
    same input, and a folder whose files were replaced is another one.
    """
    inputs = {"seed": text_fingerprint(context.model, fingerprint(context.seed))}
    for setting, experts in context.experts.items():
        prefix = "" if setting == MAIN else f"{setting} "
        for slot, params in zip(context.config.slots, experts, strict=True):
            inputs[f"{prefix}{slot}"] = fingerprint(params)
    if isinstance(context, RunContext):
        for name, (params, adapter) in context.generator_models.items():
            parts = () if adapter is None else (adapter.scale, fingerprint(adapter.factors))
            inputs[f"generator {name}"] = text_fingerprint(fingerprint(params), *parts)
    return inputs | plan_inputs(context)


def plan_inputs(plan: ScoringPlan) -> dict[str, str]:
    """Return the fingerprint of each input of a run except the weights of its models, by name."""
    inputs = {"tokenizer": _tokenizer_fingerprint(plan.tokenizer)}
    if isinstance(plan, RunPlan):
        template = () if plan.config.generation.memory is None else (plan.renderer.template.text,)
        inputs["prompt"] = text_fingerprint(plan.prompt, *template)
        if (adapter := plan.initial_adapter) is not None:
            inputs["generator"] = text_fingerprint(adapter.scale, fingerprint(adapter.factors))
        for name, programs in plan.generators.programs.items():
            inputs[f"programs {name}"] = text_fingerprint(*programs)
        for name, local in plan.generators.local.items():
            inputs[f"tokenizer {name}"] = _tokenizer_fingerprint(local.tokenizer)
    else:
        inputs["dtype"] = jnp.dtype(plan.eval_decoder.compute_dtype).name
    for split, problems in plan.problems.items():
        inputs[f"{split} problems"] = text_fingerprint(
            *((item.problem, item.tokens) for item in problems)
        )
    return inputs


def version_changes(
    old_versions: Mapping[str, str],
    versions: Mapping[str, str],
    old_inputs: Mapping[str, str],
    inputs: Mapping[str, str],
) -> list[Change]:
    """Return the differences between what a stored run was made with and this process.

    Args:
        old_versions: stored versions.
        versions: versions of this process.
        old_inputs: stored fingerprints; empty for a run of sdjax 0.2, which did not store them.
        inputs: fingerprints of this process. One that the run did not have, such as that of new
            transfer experts, is not a difference.
    """
    new = {name: value for name, value in inputs.items() if name in old_inputs or not old_inputs}
    return [
        Change(kind=kind, key=name, old=before, new=after)
        for kind, differences in (
            ("version", changed_versions(old_versions, versions)),
            ("input", changed_versions(old_inputs, new)),
        )
        for name, (before, after) in differences.items()
    ]


def describe_changes(changes: Sequence[Change]) -> str:
    """Return the changes in one line, those from unknown values last and without new values."""
    parts = [f"{one.key} {one.old} -> {one.new}" for one in changes if one.old != UNKNOWN]
    unknown = [one.key for one in changes if one.old == UNKNOWN]
    if unknown:
        parts.append(f"not recorded: {', '.join(unknown)}")
    return "; ".join(parts)


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    files = [path for name in ASSETS if (path := tokenizer.folder / name).is_file()]
    return text_fingerprint(
        *((path.name, read_bytes(path, MAX_VOCABULARY_BYTES)) for path in files)
    )
