"""The records of scores in a run's store: applied entries, structures, answers, preference pairs.

Entries and settings are records of `sdjax.search.types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdjax.evaluation.task import Outcome
from sdjax.sandbox.verdict import ADMITTED
from sdjax.search.types import MAIN


@dataclass(frozen=True, kw_only=True)
class Application:
    """The result of merging the models of a setting with an entry.

    Attributes:
        entry: name of the entry.
        setting: name of the setting whose models are merged.
        verdict: "admitted", "duplicate" if the merge equals that of an earlier program, or the
            refusal on the real weights.
        rule: check that the merge failed; empty if admitted.
        message: reason for the verdict, in one line; empty if admitted.
        change: norm of the merged task vector over the mean norm of the experts' task vectors.
        seconds: duration of the merge.
        original: identity of the earlier program with the same merge, for a duplicate.
    """

    entry: str
    setting: str = MAIN
    verdict: str = ADMITTED
    rule: str = ""
    message: str = ""
    change: float
    seconds: float = 0.0
    original: str | None = None

    @property
    def admitted(self) -> bool:
        """Whether the merged model may be scored."""
        return self.verdict == ADMITTED


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of an entry; immutable once complete.

    Attributes:
        entry: name of the entry.
        setting: name of the setting whose models are merged.
        split: "development" or "test".
        complete: whether every problem has an outcome.
    """

    entry: str
    setting: str
    split: str
    complete: bool


@dataclass(frozen=True, kw_only=True)
class StoredOutcome:
    """The outcome of one problem of an evaluation.

    Attributes:
        entry: name of the entry.
        setting: name of the setting whose models are merged.
        split: "development" or "test".
        outcome: the model's output and its grades.
    """

    entry: str
    setting: str
    split: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The accuracies of an evaluation; computed, not stored."""

    entry: str
    setting: str
    split: str
    problems: int
    strict: float
    flexible: float
    complete: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Numbers of a program's constants that were tried while its structure was scored.

    Attributes:
        structure: hash of the structure.
        number: index within the structure; 0 has the numbers of the program as it was written.
        rung: index of the rung before which the numbers were chosen.
        origin: "written", "gradient" or "sampled".
        constants: name of each constant that is tuned to its value.
        steps: gradient steps that led to the numbers, from the best ones before.
        change: norm of the merged task vector over the mean norm of the experts' task vectors.
        finite: whether the merged weights are finite; if not, there are no answers.
    """

    structure: str
    number: int
    rung: int
    origin: str
    constants: Mapping[str, float]
    steps: int = 0
    change: float
    finite: bool = True


@dataclass(frozen=True, kw_only=True)
class CandidateOutcome:
    """The outcome of one development problem for a candidate.

    Attributes:
        structure: hash of the candidate's structure.
        number: index of the candidate within the structure.
        outcome: the model's output and its grades.
    """

    structure: str
    number: int
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class ScoredStructure:
    """The result of scoring a structure: the program with its best numbers, whose score it has.

    Attributes:
        structure: hash of the structure.
        purpose: "search", or the name of a measurement.
        iteration: iteration of its first sample.
        written: identity of the first program with this structure, as it was written.
        best: identity of the program with the best numbers; `written` if no others were better.
    """

    structure: str
    purpose: str
    iteration: int
    written: str
    best: str


@dataclass(frozen=True, kw_only=True)
class ScoredSample:
    """An admissible sample with the development score of its program.

    Attributes:
        identity: identity of the program whose score this is: the sample's own or, if structures
            are scored, the one with the best numbers.
        prompt: hash of the prompt.
        text: the completion to train on.
        score: accuracy on the development problems.
        change: size of that program's change to the seed; see `Application`.
        iteration: iteration of the sample.
        number: index of the sample within the iteration.
    """

    identity: str
    prompt: str
    text: str
    score: float
    change: float
    iteration: int
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference pair.

    Attributes:
        chosen: the sample with the higher score.
        rejected: the sample with the lower score.
    """

    chosen: ScoredSample
    rejected: ScoredSample


@dataclass(frozen=True, kw_only=True)
class StoredPair(Pair):
    """A preference pair of an iteration.

    Attributes:
        iteration: iteration whose generator is trained on the pair.
        number: index within the iteration.
    """

    iteration: int
    number: int
