"""The records of a run and its programs; those of scores are in `sdjax.search.score_types`.

Each record is a row of a table; `sdjax.search.schema` derives the tables from these classes.

An *entry* is anything that is scored: the seed, an expert, a human-designed method, or a program
discovered by the run. A *setting* is the input of a merge: the seed model, the model in each slot,
the tensors in scope, and the task. The search itself uses the setting "main".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sdjax.sandbox.verdict import ADMITTED, Verdict, is_admissible

MAIN = "main"  # setting of the search itself
TRANSFER = "transfer"  # setting with other experts, on which the best programs are tested again
SEARCH = "search"  # purpose of the samples of the search itself
RANDOM = "random"  # purpose of the random programs of the grammar
UNTRAINED = "untrained"  # purpose of the programs of the untrained generator
PURPOSES = (SEARCH, RANDOM, UNTRAINED)
DEVELOPMENT = "development"
CONFIRMATION = "confirmation"  # development problems that the search never sees
TEST = "test"
NO_PROGRAM, NOT_JUDGED = "no program", "not judged"  # statuses of samples without a verdict


ADDED_LATER = "added later"  # in the metadata of a field: earlier versions do not store it
OWN_GENERATOR = "seed"  # name of the run's own generator: the seed with its adapter
GRAMMAR = "grammar"  # name of the generator of random programs, and of their empty prompt
RESERVED_GENERATORS = {OWN_GENERATOR: "the seed with its adapter", GRAMMAR: "the random control"}


def added_later(default: Any) -> Any:
    """Return a field that the rows of earlier versions lack, where it has this default."""
    return field(default=default, metadata={ADDED_LATER: True})


def phase_name(name: str, purpose: str = SEARCH) -> str:
    """Return the name of a phase such as "score", with the purpose if it is not the search."""
    return name if purpose == SEARCH else f"{name} {purpose}"


def phase_title(name: str, iteration: int, purpose: str = SEARCH) -> str:
    """Return the title of a progress bar, such as "iteration 2: score" or "random 2: score"."""
    return f"{'iteration' if purpose == SEARCH else purpose} {iteration}: {name}"


def storable(text: str) -> str:
    """Replace lone surrogates, which cannot be encoded as UTF-8, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_hash(text: str) -> str:
    """Return the first 32 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(storable(text).encode()).hexdigest()[:32]


def program_entry(identity: str) -> str:
    """Return the entry name of a discovered program."""
    return f"program:{identity}"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Record of the run itself; its table has one row.

    Attributes:
        config: the `RunConfig`, as JSON-compatible data.
        fingerprint: hash of `config`.
        versions: package versions by package name.
        layers: active confinement layers of the sandbox.
        started_at: ISO 8601 timestamp in UTC.
        finished_at: None while the run is unfinished.
    """

    config: Mapping[str, Any]
    fingerprint: str
    versions: Mapping[str, str]
    layers: tuple[str, ...]
    started_at: str
    finished_at: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """An input of the run, such as the weights of an expert.

    Attributes:
        name: "seed", a slot, "generator", "tokenizer", "prompt" or the problems of a split; the
            slots of the transfer experts start with "transfer", and of a key of `generators`, there
            are "generator NAME", "tokenizer NAME" or "programs NAME".
        fingerprint: digest of the content.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the run between two resumptions.

    Attributes:
        kind: "config", "version" or "input".
        key: key of the config, name of a package, "python", "devices", or name of an input.
        old: value or fingerprint before; "unknown" if it was not recorded.
        new: value or fingerprint afterwards.
        changed_at: ISO 8601 timestamp in UTC; empty until the change is stored.
    """

    kind: str
    key: str
    old: str
    new: str
    changed_at: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The input of a merge.

    Attributes:
        name: "main" for the search, "transfer" for the transfer experts.
        seed: name of the seed model.
        slots: mapping from slot to model.
        scope: the tensors that are merged.
        task: name of the task.
    """

    name: str = MAIN
    seed: str
    slots: Mapping[str, str]
    scope: str
    task: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved generator.

    Attributes:
        name: "generator-N".
        iteration: iteration on whose pairs the generator was trained.
        path: path within the run's folder.
        detail: the number of pairs or of samples, of their distinct texts, and of the texts with
            each fault; see `sdjax.search.training_data.TrainingData`.
    """

    name: str
    iteration: int
    path: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The generator of one iteration, and the base that its programs are applied to.

    Attributes:
        iteration: iteration that the generator writes programs for, from 1.
        setting: name of the setting of the search.
        generator: name of the model, or of the adapter of the first generator; the entry of a
            merged model if that was promoted.
        checkpoint: name of the checkpoint; None for the first generator.
        temperature: sampling temperature.
        base: entry whose merged model is the base of the iteration; None for the seed.
        generator_base: entry whose merged model the generator's adapter belongs to; None for the
            seed.
    """

    iteration: int
    setting: str = MAIN
    generator: str
    checkpoint: str | None = None
    temperature: float
    base: str | None = None
    generator_base: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A merge that has begun and not ended: it is in progress, or it killed the process.

    Attributes:
        entry: name of the entry.
        setting: name of the setting whose models are merged; "tuning" for the first merge and the
            first gradient step before a program is tuned.
        number: number of the attempt; 2 if an earlier process was killed in the first one.
    """

    entry: str
    setting: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A completed phase of an iteration.

    Attributes:
        iteration: number of the iteration, or of the batch of control programs; 0 for phases of the
            whole run.
        name: "baselines", "generate", "admit", "score", "promote", "refine", "tune",
            "controls", "confirm", "ablate" or "test";
            those of control programs end with their purpose, as in "score random".
        seconds: duration in seconds, with later work on a run that was extended. A process that
            was killed may miss the last seconds.
        finished_at: ISO 8601 timestamp in UTC.
    """

    iteration: int
    name: str
    seconds: float
    finished_at: str


@dataclass(frozen=True, kw_only=True)
class UnfinishedPhase:
    """Time spent on a phase that has begun and not ended; see `Phase`.

    Attributes:
        iteration: number of the iteration.
        name: name of the phase.
        seconds: duration so far, of all processes that have worked on it.
    """

    iteration: int
    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of the generator.

    Attributes:
        hash: first 32 hexadecimal digits of the text's SHA-256.
        name: name of the prompt in the config.
        text: text after rendering, as the generator reads it.
    """

    hash: str
    name: str
    text: str

    @classmethod
    def of(cls, name: str, text: str) -> Prompt:
        """Return the record of a prompt."""
        return cls(hash=text_hash(text), name=name, text=text)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion sampled from the generator.

    Attributes:
        purpose: "search", that of a control ("random", "untrained"), or the name of a measurement.
        iteration: iteration whose generator was sampled, or the batch of a control.
        number: index within the purpose and iteration.
        prompt: hash of the prompt.
        text: the decoded completion.
        tokens: the sampled tokens.
        stopped: whether the completion ended with a stop token rather than at the token limit.
        source: the candidate's source code, extracted from `text`; None if there is none.
        generator: name of the generator: "seed" for the run's own, which is trained, "grammar"
            for random programs, or a key of `generators`. Only the tokens of the run's own are
            stored.
        parents: identities of the programs that the prompt shows.
        operation: operation that the prompt asks for; None if it names none.
    """

    purpose: str = SEARCH
    iteration: int
    number: int
    prompt: str
    text: str
    tokens: tuple[int, ...]
    stopped: bool
    source: str | None
    generator: str = added_later(OWN_GENERATOR)
    parents: tuple[str, ...] = added_later(())
    operation: str | None = added_later(None)


@dataclass(frozen=True, kw_only=True)
class JudgedSample(Sample):
    """A sample and its status.

    Attributes:
        status: the sandbox's verdict, unless the program fails on the real weights ("non-finite",
            "too costly"); "duplicate" if an earlier sample of the same purpose has the same
            identity, the same merge or, until the merges are compared, the same results on the
            probe tensors; "no program" if the text contains none; "not judged" if the sandbox has
            not judged it yet.
        rule: check that determined the status; empty for admissible samples.
        identity: identity of the program; for a duplicate, the identity of its original.
        unconfirmed: identity of the sample's own program if it is a duplicate whose merge has not
            been compared with its original's; else None.
    """

    status: str
    rule: str
    identity: str | None
    unconfirmed: str | None = None

    @property
    def admissible(self) -> bool:
        """Whether the sample is a usable program, including duplicates."""
        return is_admissible(self.status)

    @property
    def novel(self) -> bool:
        """Whether the sample is the first one of its program."""
        return self.status == ADMITTED


@dataclass(frozen=True, kw_only=True)
class StoredVerdict:
    """The sandbox's verdict on a candidate.

    Attributes:
        source: the candidate's source code.
        verdict: "admitted", "duplicate", or the reason for the refusal.
        rule: name of the check that decided; empty if admitted.
        message: reason for the verdict, in one line; empty if admitted.
        identity: hash of the program. Equal candidates have equal identities.
        structure: hash of the program without the constants that can be tuned.
        fingerprint: hash of the rounded results on the probe tensors.
        form: "tensor" for merge_models, "tree" for merge_trees.
        requests: optional inputs that the candidate reads: base, key, depth, kind.
        notes: remarks on the results, such as "equals the seed".
        cost: units of cost over all tensors in scope, loop iterations included; one unit is a
            product of two elements.
        memory: peak bytes alive at once in one array program.
        layers: confinement layers that were active.
    """

    source: str
    verdict: str
    rule: str = ""
    message: str = ""
    identity: str | None = None
    structure: str | None = None
    fingerprint: str | None = None
    form: str | None = None
    requests: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cost: int | None = None
    memory: int | None = None
    layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str, verdict: Verdict, layers: tuple[str, ...] = ()) -> StoredVerdict:
        """Return the stored form of a verdict."""
        names = {column.name for column in fields(cls)} - {"source", "layers"}
        values = {name: getattr(verdict, name) for name in names}
        return cls(source=source, layers=layers, **values)


@dataclass(frozen=True, kw_only=True)
class Program:
    """An admissible program.

    Attributes:
        identity: hash of the verified program, and of its base unless that is the seed.
        source: first source code with this identity; untrusted, never executed.
        ir: the verified program as JSON.
        fingerprint: hash of its outputs on the probe tensors; None if it was not probed.
        in_training: whether the generator was trained on it; None if unknown.
        families: families of its operations.
        held_out: the families that the training programs do not contain.
        notes: remarks of the sandbox.
        cost: units of cost over the scope.
        base: entry whose merged model the program is applied to; None for the seed. See
            `sdjax.search.bases`.
    """

    identity: str
    source: str
    ir: str = ""
    fingerprint: str | None = None
    in_training: bool | None = None
    families: tuple[str, ...] | None = None
    held_out: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    cost: int | None = None
    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A scored item: a model, a method or a program.

    Attributes:
        name: name such as "seed", "expert:expert_1", "method:ties(density=0.4)",
            "program:IDENTITY" or "ablation:IDENTITY:scaled by 0.5".
        kind: "seed", "expert", "method", "program" or "ablation".
        identity: identity of a program; None for other kinds.
        detail: of a method, its name, hyperparameters and grids; of a tuned control, its family,
            values and cost; of a tuned program, the identity of the program as it was written. Both
            have the number of their tuned constants, as has a program whose own were the best. Of
            an ablation, its program and what was changed.
    """

    name: str
    kind: str
    identity: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
