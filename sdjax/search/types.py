"""What goes into a run's store and comes out of it, as frozen dataclasses."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

MAIN = "main"  # the setting of an ordinary search
SEARCH = "search"  # the purpose of the samples that the search itself draws
DEVELOPMENT = "development"
TEST = "test"


def storable(text: str) -> str:
    """The text with lone surrogates, which no file can hold as UTF-8, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_hash(text: str) -> str:
    """The key of a source text or a prompt: 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(storable(text).encode()).hexdigest()[:32]


def program_candidate(identity: str) -> str:
    """The candidate's name of a discovered program."""
    return f"program:{identity}"


class VerdictLike(Protocol):
    """The fields of `sdjax.sandbox.verdict.Verdict` that the store keeps."""

    @property
    def verdict(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def identity(self) -> str | None: ...
    @property
    def structure(self) -> str | None: ...
    @property
    def fingerprint(self) -> str | None: ...
    @property
    def cost(self) -> int | None: ...
    @property
    def memory(self) -> int | None: ...
    @property
    def requests(self) -> tuple[str, ...]: ...
    @property
    def form(self) -> str | None: ...
    @property
    def ir(self) -> str | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class StoredVerdict:
    """A verdict on one source text, with the text and the sandbox layers it was judged under."""

    source: str
    verdict: str
    rule: str
    message: str
    identity: str | None = None
    structure: str | None = None
    fingerprint: str | None = None
    cost: int | None = None
    memory: int | None = None
    requests: tuple[str, ...] = ()
    form: str | None = None
    ir: str | None = None
    notes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The one row of table run."""

    config: Mapping[str, Any]
    fingerprint: str
    versions: Mapping[str, str]
    layers: tuple[str, ...]
    started_at: str
    finished_at: str | None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What candidates are applied to."""

    name: str = MAIN
    seed: str
    slots: Mapping[str, str]
    scope: str
    task: str


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where the seed and the generator of one iteration come from."""

    iteration: int
    setting: str = MAIN
    generator: str
    checkpoint: str | None = None
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved generator."""

    name: str
    iteration: int
    role: str = "generator"
    path: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of the generator; `source` is None when it holds no program."""

    purpose: str = SEARCH
    iteration: int
    number: int
    prompt: str  # hash
    text: str
    tokens: tuple[int, ...]
    stopped: bool
    source: str | None


@dataclass(frozen=True, kw_only=True)
class JudgedSample:
    """A sample and what became of it.

    `status`: the name of the sandbox's verdict, or of the one that the real weights put in its
    place ("non-finite", "too costly"); "duplicate" where an earlier sample of this purpose has the
    same identity or the same outputs on the probe tensors; "no program" where the text holds none;
    "not judged" yet. `identity` is that of the program it stands for (a duplicate: the original's).
    """

    iteration: int
    number: int
    prompt: str
    text: str
    tokens: tuple[int, ...]
    stopped: bool
    source_hash: str | None
    status: str
    rule: str
    identity: str | None

    @property
    def admissible(self) -> bool:
        return self.status in ("admitted", "duplicate")

    @property
    def novel(self) -> bool:
        return self.status == "admitted"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program by identity. None in the last three: the run does not know."""

    identity: str
    source: str
    fingerprint: str | None = None
    in_training: bool | None = None
    families: tuple[str, ...] | None = None
    held_out: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    cost: int | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Anything that is scored."""

    name: str
    kind: str  # "seed", "expert", "method", "program", "control"
    identity: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Application:
    """What applying a candidate in a setting gave."""

    candidate: str
    setting: str = MAIN
    verdict: str = "admitted"  # or what the real weights made of it, in the sandbox's words
    rule: str = ""
    message: str = ""
    change: float
    seconds: float = 0.0

    @property
    def admitted(self) -> bool:
        return self.verdict == "admitted"


class OutcomeLike(Protocol):
    """The fields of `sdjax.evaluation.task.Outcome`."""

    @property
    def problem_id(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def strict(self) -> bool: ...
    @property
    def flexible(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Accuracies of one candidate in one setting on one split."""

    candidate: str
    setting: str
    split: str
    problems: int
    strict: float
    flexible: float
    complete: bool
