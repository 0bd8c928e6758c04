"""Measure what a seed of the zoo writes for prompts with zero, one and two earlier programs.

The script samples programs without memory, and shows the admissible ones in further prompts, as a
search does, with scores drawn at random. It reports the share of admissible programs, of programs
that differ from those in their prompt and from everything before (training programs included), of
programs with a gate on a single expert, of those with a family that training lacks, and how many
lines of an admissible one are lines of the last, best program in its prompt. It reads no
problems, except for the accuracies, which are of the calibration split.

    python -m benchmarks.zoo.prompts --seed zoo:seed --samples 128
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.environment import describe_environment
from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.sampling import Sampling
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import model_folder
from sdjax.io.tokenizer import load_tokenizer
from sdjax.io.training_programs import read_training_identities
from sdjax.programs.extraction import extract_source
from sdjax.programs.families import HELD_OUT, families_of
from sdjax.programs.memory_prompts import OPERATIONS, EarlierProgram, PromptMemory
from sdjax.programs.signature import model_signature
from sdjax.sandbox.sandbox import Sandbox
from sdjax.training.warmstart import signature_digest
from sdjax.zoo.evaluator import Evaluator
from sdjax.zoo.programs import MAX_TARGET, SLOTS, ProgramText

DECODER = DecoderConfig(
    slots=64, prefill_batch=32, buckets=(10, 128, 192, 256, 320), max_new_tokens=MAX_TARGET
)
# Assigns to an expert's variable an expression of the depth or the kind times the same variable.
GATE = re.compile(r"^ +(a|b|c|x|y|z|t1|t2|t3) = (.*depth|.*kind|\S+ \* \1$)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A program that the seed wrote, and its verdict; the identity of a refused one is None."""

    memory: PromptMemory
    source: str | None
    identity: str | None
    reason: str
    families: frozenset[str]


class Bench:
    """A seed, its decoder, and the sandbox that judges what it writes."""

    def __init__(self, seed: str, sandbox: Sandbox) -> None:
        folder = model_folder(seed)
        config, self.params = load_model(folder)
        tokenizer = load_tokenizer(folder)
        self.decoder = Decoder(config, DECODER, tokenizer=tokenizer)
        self.sandbox = sandbox

    def write(self, memories: list[PromptMemory], *, temperature: float, key: int) -> list[Written]:
        """Sample one program per prompt, and judge it."""
        prompts = [ProgramText(memory=memory, source="").prompt for memory in memories]
        completions = self.decoder.generate(
            self.params,
            prompts,
            sampling=Sampling(temperature=temperature),
            key=jax.random.key(key),
        )
        sources = [extract_source(completion.text or "") for completion in completions]
        verdicts = dict(self.sandbox.judge_all([source or "" for source in sources]))
        written = []
        for n, (memory, source) in enumerate(zip(memories, sources, strict=True)):
            verdict = verdicts[n]
            admissible = verdict.program is not None
            written.append(
                Written(
                    memory=memory,
                    source=source,
                    identity=verdict.identity if admissible else None,
                    reason="" if admissible else f"{verdict.verdict}: {verdict.rule}",
                    families=families_of(verdict.program) if verdict.program else frozenset(),
                )
            )
        return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", default="zoo:seed", help="a model of the zoo, or its folder")
    parser.add_argument("--samples", type=int, default=128, help="programs per row of the table")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--show", type=int, default=0, help="examples per row to print")
    options = parser.parse_args()
    folder = model_folder(options.seed)
    signature = model_signature(load_config(folder), SLOTS, "mlp")
    stored = read_training_identities(folder, signature_digest(signature))
    known = set() if stored is None else {int(identity) for identity in stored}
    print(f"{describe_environment()}; {options.seed}, temperature {options.temperature}")
    print(
        "| prompt | admissible | differ from their prompt | new | gated | lines of the best "
        "| untrained families |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with Sandbox(signature, workers=2) as sandbox:
        bench = Bench(options.seed, sandbox)
        earlier = bench.write(
            [PromptMemory()] * options.samples, temperature=options.temperature, key=0
        )
        print(row("no program", earlier, known), flush=True)
        shown = {w.identity: w.source for w in earlier if w.identity and w.source}
        rng = np.random.default_rng(0)
        for operation in OPERATIONS:
            for count in (1, 2):
                if operation == "combine" and count == 1:
                    continue
                memories = [memory(rng, shown, operation, count) for _ in range(options.samples)]
                written = bench.write(memories, temperature=options.temperature, key=count)
                print(row(f"{operation}, {count} shown", written, known, set(shown)), flush=True)
                for example in written[: options.show]:
                    print(f"{example.memory}\n{example.reason}\n{example.source}\n")
    evaluator = Evaluator(load_tokenizer(folder), load_config(folder), split="calibration")
    accuracies = evaluator.accuracies(load_model(folder)[1])
    print(", ".join(f"{kind} {accuracy:.2f}" for kind, accuracy in accuracies.items()))


def memory(
    rng: np.random.Generator, sources: dict[str, str], operation: str, count: int
) -> PromptMemory:
    """Return what a prompt shows: distinct random programs with random scores."""
    names = list(sources)
    chosen = [names[int(n)] for n in rng.choice(len(names), size=count, replace=False)]
    scores = sorted(float(score) for score in rng.uniform(40, 85, size=count))
    programs = tuple(
        EarlierProgram(source=sources[name], score=score)
        for name, score in zip(chosen, scores, strict=True)
    )
    return PromptMemory(programs=programs, operation=operation)


def row(title: str, written: list[Written], known: set[int], earlier: Iterable[str] = ()) -> str:
    """Return a row of the table; all shares are of all samples."""
    seen = {int(identity[:16], 16) for identity in earlier} | known
    differ = new = gated = lacking = admissible = 0
    kept = []
    for item in written:
        if item.identity is None:
            continue
        admissible += 1
        differ += all(item.source != program.source for program in item.memory.programs)
        new += int(item.identity[:16], 16) not in seen
        seen.add(int(item.identity[:16], 16))
        gated += bool(GATE.search(item.source or ""))
        lacking += bool(item.families & HELD_OUT)
        if item.memory.programs:
            kept.append(share_of_lines(item.source or "", item.memory.programs[-1].source))
    counts = (admissible, differ, new, gated)
    shares = " | ".join(f"{count / len(written):.2f}" for count in counts)
    lines = f"{np.mean(kept):.2f}" if kept else "–"
    return f"| {title} | {shares} | {lines} | {lacking} programs |"


def share_of_lines(source: str, other: str) -> float:
    """Return the share of a program's lines, from the definition on, that another one has too."""
    lines = source.partition("def merge_models")[2].strip().splitlines()
    return sum(line in other.splitlines() for line in lines[1:]) / max(1, len(lines) - 1)


if __name__ == "__main__":
    main()
