"""What the generator is trained on after an iteration: preference pairs, or samples and advantages.

The functions are pure; `sdjax.search.refinement` reads their inputs from the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sdjax.search.pairs import prompt_groups
from sdjax.search.score_types import Pair, ScoredSample
from sdjax.search.selection_config import SelectionConfig
from sdjax.search.types import NOT_JUDGED, JudgedSample
from sdjax.training.advantages import entropic_advantages

REFUSED, DUPLICATE, UNCHANGED = "refused", "duplicate", "unchanged"  # faults


@dataclass(frozen=True, kw_only=True)
class WeightedSample:
    """A sample with its advantage over the others of its group."""

    sample: ScoredSample
    advantage: float


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The preference pairs or, with `training.objective: entropic`, the samples of a round.

    Attributes:
        pairs: preference pairs.
        samples: samples with advantages.
    """

    pairs: tuple[Pair, ...] = ()
    samples: tuple[WeightedSample, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to train on."""
        return not self.pairs and not self.samples

    def summary(self) -> dict[str, int]:
        """Return the number of pairs or samples, of distinct texts, and of texts with each fault.

        With pairs, also the largest number of pairs in which one text is the chosen one.
        """
        every = [one.sample for one in self.samples]
        every += [side for pair in self.pairs for side in (pair.chosen, pair.rejected)]
        texts = {(one.prompt, one.text): one.fault for one in every}
        counts = {"pairs": len(self.pairs)} if self.pairs or not every else {"samples": len(every)}
        counts["texts"] = len(texts)
        if self.pairs:
            uses = Counter((pair.chosen.prompt, pair.chosen.text) for pair in self.pairs)
            counts["most_pairs_of_one_text"] = max(uses.values())
        return counts | dict(sorted(Counter(fault for fault in texts.values() if fault).items()))


def fault_of(sample: JudgedSample, change: float | None, config: SelectionConfig) -> str | None:
    """Return why a sample is rejected whatever its score, or None if its score decides.

    A child that equals a parent, or anything else that the search has found before, is a duplicate.

    Args:
        sample: a judged sample.
        change: size of its program's change to the seed; None if it was not applied.
        config: which faults count.
    """
    if config.refused and not sample.admissible and sample.status != NOT_JUDGED:
        return REFUSED
    if config.duplicates and sample.admissible and not sample.novel:
        return DUPLICATE
    if config.unchanged and change is not None and change < config.min_change:
        return UNCHANGED
    return None


def weighted_samples(
    samples: Iterable[ScoredSample], *, within_prompt: bool
) -> tuple[WeightedSample, ...]:
    """Return samples with their entropic advantages, in sampling order.

    The reward of a sample is its score, or 0 if it has a fault. Groups whose rewards are all equal
    teach nothing and are left out.

    Args:
        samples: samples of the generator that is trained.
        within_prompt: whether a group is the samples of one prompt; else it is all of them.
    """
    ordered = sorted(samples, key=lambda one: (one.iteration, one.number))
    groups = [group for group, _ in prompt_groups(ordered, [])] if within_prompt else [ordered]
    weighted = []
    for group in groups:
        rewards = np.array([0.0 if one.fault else one.score for one in group])
        advantages = entropic_advantages(rewards)
        if advantages.any():
            weighted += [
                WeightedSample(sample=one, advantage=float(advantage))
                for one, advantage in zip(group, advantages, strict=True)
            ]
    return tuple(sorted(weighted, key=lambda one: (one.sample.iteration, one.sample.number)))
