"""A warm start for generators: a model learns to write programs in the algorithm API.

A small or untuned model writes no program that would be admitted. It is fine-tuned on programs
that the grammar draws, behind the very prompt from which a search will sample. The prompt is the
same for all, so its keys and values are computed once a step, and the loss is on programs alone.
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
from sdjax.training.packing import behind_prefix

# Rows are padded to a multiple of this, so that a few shapes are compiled.
_GRAIN = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmstartData:
    """What a generator is shown.

    Attributes:
        prompt: tokens.
        programs: their texts.
        targets: their tokens, as answers to the prompt, end token included.
    """

    prompt: tuple[int, ...]
    programs: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]


def draw_programs(count: int, random: int, *, slots: int) -> tuple[str, ...]:
    """Distinct programs that the grammar does not make fail, in the order in which it draws them.

    Only programs that are meant to be admitted: a warm start is not to teach failures.
    """
    rng = np.random.default_rng(random)
    texts: dict[str, None] = {}
    while len(texts) < count:
        program = sample_program(rng, slots=slots)
        if not program.fails:
            texts[program.text.strip("\n")] = None
    return tuple(texts)


def make_lesson(
    tokenizer: Tokenizer, prompt: str, descriptions: Sequence[str], programs: Sequence[str]
) -> WarmstartData:
    """The prompt of that name for experts of these descriptions, and programs as its answers."""
    slots = tuple(f"expert_{number}" for number in range(1, len(descriptions) + 1))
    text = render(
        prompt,
        slots=slots,
        descriptions=dict(zip(slots, descriptions, strict=True)),
        chat=tokenizer.as_prompt,
    )
    end = tokenizer.eos_ids[:1]
    return WarmstartData(
        prompt=tuple(tokenizer.encode_prompt(text)),
        programs=tuple(programs),
        targets=tuple(
            (*tokenizer.encode(f"```python\n{program}\n```", add_special=False), *end)
            for program in programs
        ),
    )


def lesson_batches(
    lesson: WarmstartData, *, batch: int, steps: int, key: jax.Array
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of programs of similar lengths, in a new order each time they are used up."""
    by_length = sorted(range(len(lesson.targets)), key=lambda n: len(lesson.targets[n]))
    groups = [by_length[start : start + batch] for start in range(0, len(by_length), batch)]
    groups[-1] = by_length[-batch:]
    done = 0
    for epoch in range(steps):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(groups))
        for place in np.asarray(order):
            if done == steps:
                return
            done += 1
            targets = [lesson.targets[number] for number in groups[place]]
            longest = 1 + max(map(len, targets))
            yield behind_prefix(lesson.prompt, targets, -(-longest // _GRAIN) * _GRAIN)


def signature_for(config: ModelConfig, *, experts: int, scope: Scope = "mlp") -> MergeSignature:
    """What a program of a search over this model is traced against."""
    specs = param_specs(config)
    slots = tuple(f"expert_{number}" for number in range(1, experts + 1))
    shapes = {path: (kind_of(path), specs[path].shape) for path in select_paths(specs, scope)}
    return MergeSignature.of(slots, shapes)


def name_of(signature: MergeSignature) -> str:
    """What tells contracts apart over which a program has different identities: hexadecimal.

    Limits are left out: they decide whether a program is admitted, not what it is.
    """
    told = (signature.slots, signature.tensors, signature.paths)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def identities_of(programs: Sequence[str], signature: MergeSignature) -> Iterator[int | None]:
    """The first 64 bits of each program's identity; None of one that is refused.

    For programs of our own alone: they are traced here rather than in the sandbox, by its code.
    """
    for text in programs:
        try:
            yield int(verify_ir(trace_trusted(text, signature), signature).identity[:16], 16)
        except Refusal:
            yield None  # the grammar writes some programs that fail
