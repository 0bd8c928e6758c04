"""The records of scores in a run's store: applied entries, their outcomes, and what follows.

Entries and settings are records of `sdjax.search.types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdjax.evaluation.statistics import Interval
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
        split: "development", "confirmation" or "test".
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
        split: "development", "confirmation" or "test".
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
    """A sample that the generator may be trained on, with the development score of its program.

    Attributes:
        identity: identity of the program whose score this is: the sample's own or, if structures
            are scored, the one with the best numbers. Empty for a sample without an admissible
            program.
        prompt: hash of the prompt.
        text: the completion to train on.
        score: accuracy on the development problems; 0 without an admissible program.
        change: size of that program's change to the seed; see `Application`.
        iteration: iteration of the sample.
        number: index of the sample within the iteration.
        fault: why the sample is rejected whatever its score: "refused", "duplicate" or "unchanged";
            None if its score decides.
    """

    identity: str
    prompt: str
    text: str
    score: float
    change: float
    iteration: int
    number: int = 0
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference pair.

    Attributes:
        chosen: the sample with the higher score.
        rejected: the sample with the lower score, or with a fault.
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


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """The decision after an iteration whether the best merged model is the next base or generator.

    Attributes:
        purpose: "search", that of a control, or what a tuned control is; see
            `sdjax.search.control_bases`.
        iteration: iteration, batch or step after which it was decided.
        base: entry whose merged model was the base so far; None for the seed.
        entry: entry whose merged model was compared with it; None if there was no new best one
            with a higher development score.
        problems: number of confirmation problems.
        gain: accuracy of the merged model minus that of the base on them.
        low: lower end of the interval of `gain`.
        high: upper end of the interval of `gain`.
        p_value: of the two-sided paired t-test of no difference.
        confidence: confidence level of the interval; see `sdjax.search.promotion`.
        is_base: whether the merged model is the base of the later iterations.
        is_generator: whether the later generators start from the merged model.
        admissible: share of admissible samples of the merged model as a generator; None if it was
            not sampled.
        admissible_before: the same of the present generator.
        fingerprint: fingerprint of the merged model's parameters if it was promoted.
    """

    purpose: str
    iteration: int
    base: str | None = None
    entry: str | None = None
    problems: int = 0
    gain: float = 0.0
    low: float = 0.0
    high: float = 0.0
    p_value: float = 1.0
    confidence: float = 0.0
    is_base: bool = False
    is_generator: bool = False
    admissible: float | None = None
    admissible_before: float | None = None
    fingerprint: str | None = None

    @property
    def interval(self) -> Interval:
        """The gain with its interval."""
        return Interval(mean=self.gain, low=self.low, high=self.high)


@dataclass(frozen=True, kw_only=True)
class TestOpening:
    """One opening of the test problems, which scores entries that were not tested before.

    Attributes:
        setting: name of the setting whose models are merged.
        number: 1 for the first opening. A later one follows an extension of the run.
        entries: names of the entries that are tested.
        earlier_bests: names of further programs, which were the best ones at some point of the
            search. They are tested to show by how much selection overestimates, and are neither in
            the tables nor compared with controls.
    """

    __test__ = False  # pytest would collect a class named Test…

    setting: str = MAIN
    number: int
    entries: tuple[str, ...]
    earlier_bests: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A tested program, compared with the best control that has at most as many numbers.

    Attributes:
        opening: number of times that the test had been opened.
        program: entry name of the program.
        program_numbers: number of its constants that can be tuned.
        control: entry name of the control.
        control_numbers: number of the control's tuned numbers, or hyperparameters of a grid.
        problems: number of test problems.
        gain: accuracy of the program minus that of the control on the test problems.
        low: lower end of the interval of `gain`.
        high: upper end of the interval of `gain`.
        p_value: of the two-sided paired t-test of no difference.
        confidence: confidence level of the interval, by Holm's procedure over all comparisons; see
            `sdjax.search.answer`.
    """

    opening: int
    program: str
    program_numbers: int
    control: str
    control_numbers: int
    problems: int
    gain: float
    low: float
    high: float
    p_value: float
    confidence: float

    @property
    def is_discovery(self) -> bool:
        """Whether the program is better than the control."""
        return self.low > 0

    @property
    def interval(self) -> Interval:
        """The gain with its interval."""
        return Interval(mean=self.gain, low=self.low, high=self.high)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a run: whether anything was discovered.

    Attributes:
        opening: number of times that the test had been opened.
        sentence: the answer in one sentence.
        is_discovery: whether the best program is better than its control, as tuned or as written.
        tuned: entry name of the best program as it was tuned; None if it was not.
        written: entry name of the best program as it was written.
        selected_by: split by whose scores the best program and the controls were selected.
    """

    opening: int
    sentence: str
    is_discovery: bool
    tuned: str | None
    written: str | None
    selected_by: str
