"""Faults of samples, samples with advantages, and the summary of a round's data."""

import numpy as np
import pytest

from sdjax.search.score_types import Pair, ScoredSample
from sdjax.search.selection_config import SelectionConfig
from sdjax.search.training_data import TrainingData, fault_of, weighted_samples
from sdjax.search.types import JudgedSample
from sdjax.training.advantages import entropic_advantages

EVERY = SelectionConfig(refused=True, duplicates=True, unchanged=True, min_change=0.1)


def judged(status):
    return JudgedSample(
        iteration=1,
        number=0,
        prompt="p",
        text="t",
        tokens=(1,),
        stopped=True,
        source="s",
        status=status,
        rule="",
        identity=None,
    )


@pytest.mark.parametrize(
    ("status", "change", "fault"),
    [
        ("admitted", 0.5, None),
        ("admitted", 0.05, "unchanged"),
        ("admitted", None, None),  # not scored yet
        ("duplicate", 0.5, "duplicate"),
        ("duplicate", 0.05, "duplicate"),
        ("refused", None, "refused"),
        ("no program", None, "refused"),
        ("too costly", None, "refused"),
        ("not judged", None, None),
    ],
)
def test_faults_of_samples(status, change, fault):
    assert fault_of(judged(status), change, EVERY) == fault
    assert fault_of(judged(status), change, SelectionConfig(min_change=0.1)) is None


def sample(number, score, *, prompt="a", fault=None, text=None):
    return ScoredSample(
        identity=f"{number}",
        prompt=prompt,
        text=text or f"text {number}",
        score=score,
        change=1.0,
        iteration=1,
        number=number,
        fault=fault,
    )


def test_samples_are_weighted_within_a_prompt_or_the_iteration():
    samples = [
        sample(0, 0.1), sample(1, 0.5, prompt="b"), sample(2, 0.3), sample(3, 0.5, prompt="b"),
        sample(4, 0.9, fault="duplicate"),
    ]  # fmt: skip
    whole = weighted_samples(reversed(samples), within_prompt=False)
    assert [one.sample for one in whole] == samples
    rewards = np.array([0.1, 0.5, 0.3, 0.5, 0.0])
    np.testing.assert_allclose([one.advantage for one in whole], entropic_advantages(rewards))
    # the samples of prompt b have equal scores, which teach nothing
    within = weighted_samples(samples, within_prompt=True)
    assert [one.sample.number for one in within] == [0, 2, 4]
    expected = entropic_advantages(np.array([0.1, 0.3, 0.0]))
    np.testing.assert_allclose([one.advantage for one in within], expected)


def test_summary_counts_texts_and_faults():
    best, good, bad = sample(0, 0.9), sample(1, 0.7), sample(2, 0.1)
    refused, again = sample(3, 0.0, fault="refused"), sample(4, 0.7, fault="duplicate")
    pairs = [(best, bad), (best, refused), (good, refused), (best, again)]
    data = TrainingData(pairs=tuple(Pair(chosen=one, rejected=other) for one, other in pairs))
    assert data.summary() == {
        "pairs": 4,
        "texts": 5,
        "most_pairs_of_one_text": 3,
        "duplicate": 1,
        "refused": 1,
    }
    weighted = TrainingData(
        samples=weighted_samples([best, good, bad, refused], within_prompt=False)
    )
    assert weighted.summary() == {"samples": 4, "texts": 4, "refused": 1}
    assert TrainingData().is_empty
    assert TrainingData().summary() == {"pairs": 0, "texts": 0}
