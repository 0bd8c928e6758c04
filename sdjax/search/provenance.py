"""What a run's numbers depend on besides its config: versions, weights, tokenizer and problems."""

from __future__ import annotations

from collections.abc import Mapping

from sdjax.io.hf_checkpoint import ASSETS
from sdjax.io.tokenizer import Tokenizer
from sdjax.models.fingerprint import fingerprint, text_fingerprint
from sdjax.search.context import RunContext
from sdjax.search.types import MAIN, Change

UNKNOWN = "unknown"


def run_inputs(context: RunContext) -> dict[str, str]:
    """Return the fingerprint of each input of a run, by name.

    Fingerprints of weights are those of the loaded arrays, so a copied or renamed folder is the
    same input, and a folder whose files were replaced is another one.
    """
    inputs = {"seed": text_fingerprint(context.model, fingerprint(context.seed))}
    for setting, experts in context.experts.items():
        prefix = "" if setting == MAIN else f"{setting} "
        for slot, params in zip(context.config.slots, experts, strict=True):
            inputs[f"{prefix}{slot}"] = fingerprint(params)
    if context.initial_adapter is not None:
        adapter = context.initial_adapter
        inputs["generator"] = text_fingerprint(adapter.scale, fingerprint(adapter.factors))
    inputs["tokenizer"] = _tokenizer_fingerprint(context.tokenizer)
    inputs["prompt"] = text_fingerprint(context.prompt)
    for split, problems in context.problems.items():
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
    changes = [
        Change(kind="version", key=name, old=old_versions.get(name, UNKNOWN), new=version)
        for name, version in versions.items()
        if old_versions.get(name) != version
    ]
    changes += [
        Change(kind="version", key=name, old=version, new="not installed")
        for name, version in old_versions.items()
        if name not in versions
    ]
    return changes + [
        Change(kind="input", key=name, old=old_inputs.get(name, UNKNOWN), new=value)
        for name, value in inputs.items()
        if old_inputs.get(name) != value and (name in old_inputs or not old_inputs)
    ]


def describe_changes(changes: list[Change]) -> str:
    """Return the changes in one line, the unknown ones last and without their values."""
    known = [
        f"{change.key} {change.old} -> {change.new}" for change in changes if change.old != UNKNOWN
    ]
    unknown = [change.key for change in changes if change.old == UNKNOWN]
    if unknown:
        known.append(f"it does not record {', '.join(unknown)}")
    return "; ".join(known)


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    files = [path for name in ASSETS if (path := tokenizer.folder / name).is_file()]
    return text_fingerprint(*((path.name, path.read_bytes()) for path in files))
