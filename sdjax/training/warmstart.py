"""Warm start of generators: supervised fine-tuning on candidates that the grammar samples.

A small or untuned model writes no candidate that the sandbox would admit. The warm start trains it
on valid candidates after the same prompt from which a search will sample. As all targets share that
prompt, its keys and values are computed once per step, and the loss covers the candidates only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sdjax.io.tokenizer import Tokenizer
from sdjax.merging.scope import Scope, select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.params import kind_of, param_specs
from sdjax.programs.grammar import sample_program
from sdjax.programs.prompts import render
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.training.packing import prefix_batch, shuffled_batches
from sdjax.training.types import Batch

# Rows are padded to a multiple of this, so that few shapes are compiled.
_LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmstartData:
    """Training data of a warm start.

    Attributes:
        prompt: tokens that precede every target.
        candidates: source texts.
        targets: tokens of each candidate as an answer to the prompt, end-of-sequence included.
    """

    prompt: tuple[int, ...]
    candidates: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]


def sample_candidates(count: int, seed: int, *, slots: int) -> tuple[str, ...]:
    """Return distinct candidates in the order in which the grammar samples them.

    Candidates that the grammar breaks on purpose are left out: a warm start should teach only what
    the sandbox admits.

    Args:
        count: number of candidates.
        seed: seed of the random generator.
        slots: number of experts that a candidate merges.
    """
    rng = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        program = sample_program(rng, slots=slots)
        if not program.fails:
            texts[program.text.strip("\n")] = None
    return tuple(texts)


def make_warmstart_data(
    tokenizer: Tokenizer, prompt: str, descriptions: Sequence[str], candidates: Sequence[str]
) -> WarmstartData:
    """Tokenize candidates as answers to a prompt.

    Args:
        tokenizer: the generator's tokenizer.
        prompt: name of a prompt in `sdjax.programs.prompts`.
        descriptions: one line per expert.
        candidates: source texts.
    """
    slots = _slot_names(len(descriptions))
    text = render(
        prompt,
        slots=slots,
        descriptions=dict(zip(slots, descriptions, strict=True)),
        chat=tokenizer.as_prompt,
    )
    end = tokenizer.eos_ids[:1]
    return WarmstartData(
        prompt=tuple(tokenizer.encode_prompt(text)),
        candidates=tuple(candidates),
        targets=tuple(
            (*tokenizer.encode(f"```python\n{candidate}\n```", add_special=False), *end)
            for candidate in candidates
        ),
    )


def warmstart_batches(
    data: WarmstartData, *, batch_size: int, num_batches: int, key: jax.Array
) -> Iterator[Batch]:
    """Yield batches of candidates of similar length, in a new order each epoch.

    Args:
        data: prompt and targets.
        batch_size: candidates per batch.
        num_batches: number of batches to yield.
        key: random key of the order.
    """
    by_length = sorted(range(len(data.targets)), key=lambda n: len(data.targets[n]))
    groups = [
        by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)
    ]
    groups[-1] = by_length[-batch_size:]
    for (group,) in shuffled_batches(len(groups), batch_size=1, num_batches=num_batches, key=key):
        targets = [data.targets[index] for index in groups[group]]
        longest = 1 + max(map(len, targets))
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        yield prefix_batch(data.prompt, targets, length)


def merge_signature(config: ModelConfig, *, experts: int, scope: Scope = "mlp") -> MergeSignature:
    """Return the signature that candidates of a search over this model are traced with."""
    specs = param_specs(config)
    shapes = {path: (kind_of(path), specs[path].shape) for path in select_paths(specs, scope)}
    return MergeSignature.of(_slot_names(experts), shapes)


def signature_digest(signature: MergeSignature) -> str:
    """Return a hexadecimal digest of the parts of a signature that affect a candidate's identity.

    Limits are left out: they decide whether a candidate is admitted, not what it is.
    """
    content = (signature.slots, signature.tensors, signature.paths)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def candidate_identities(
    candidates: Sequence[str], signature: MergeSignature
) -> Iterator[int | None]:
    """Yield the first 64 bits of each candidate's identity, or None if it is refused.

    Only for candidates that sdjax generated itself: they are traced in this process, without the
    sandbox.
    """
    for text in candidates:
        try:
            yield int(verify_ir(trace_trusted(text, signature), signature).identity[:16], 16)
        except Refusal:
            yield None  # the grammar writes some candidates that fail


def _slot_names(experts: int) -> tuple[str, ...]:
    return tuple(f"expert_{number}" for number in range(1, experts + 1))
