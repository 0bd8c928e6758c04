"""Warm start of generators: supervised fine-tuning on candidates sampled from the grammar.

A small or untuned model never writes a candidate that the sandbox admits. The warm start trains it
on valid candidates, as completions of the prompt that the search will use. All targets share that
prompt, so its keys and values are computed once per step. The loss covers only the candidates.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sdjax.core.progress import progress_bar
from sdjax.io.tokenizer import Tokenizer
from sdjax.merging.engine import default_slots
from sdjax.programs.grammar import sample_candidate
from sdjax.programs.prompts import find_prompt
from sdjax.sandbox.signature import MergeSignature
from sdjax.training.packing import prefix_batch, shuffled_batches
from sdjax.training.types import Batch

# Rows are padded to a multiple of this to limit the number of compiled shapes.
_LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmstartData:
    """Training data of a warm start.

    Attributes:
        prompt: tokens that precede every target.
        candidates: source code of each candidate.
        targets: tokens of each candidate as a completion, including end-of-sequence.
    """

    prompt: tuple[int, ...]
    candidates: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]


def sample_candidates(count: int, seed: int, *, slots: int) -> tuple[str, ...]:
    """Sample distinct candidates from the grammar and return them in sampling order.

    Intentionally broken candidates are skipped: a warm start should teach only candidates that the
    sandbox admits.

    Args:
        count: number of candidates.
        seed: seed of the random generator.
        slots: number of experts to merge.
    """
    rng = np.random.default_rng(seed)
    candidates: dict[str, None] = {}
    with progress_bar("candidates", count) as advance:
        while len(candidates) < count:
            candidate = sample_candidate(rng, slots=slots)
            text = candidate.text.strip("\n")
            if not candidate.fails and text not in candidates:
                candidates[text] = None
                advance()
    return tuple(candidates)


def make_warmstart_data(
    tokenizer: Tokenizer, prompt: str, descriptions: Sequence[str], candidates: Sequence[str]
) -> WarmstartData:
    """Tokenize candidates as completions of a prompt.

    Args:
        tokenizer: the generator's tokenizer.
        prompt: name of a shipped prompt, or path of a text file; see `sdjax.programs.prompts`.
        descriptions: one line per expert.
        candidates: source code of each candidate.
    """
    slots = default_slots(len(descriptions))
    text = find_prompt(prompt).render(
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
        key: PRNG key for shuffling.
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


def signature_digest(signature: MergeSignature) -> str:
    """Return a hexadecimal digest of the parts of a signature that affect a candidate's identity.

    Limits are excluded: they affect whether a candidate is admitted, but not its identity.
    """
    content = (signature.slots, signature.tensors, signature.paths)
    return hashlib.sha256(repr(content).encode()).hexdigest()
