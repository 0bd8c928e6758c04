"""The arms of the comparison: what each changes in the config that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdjax.core.errors import UserError

CONTROLS = "controls"  # in place of an arm: the tuned merges

# Every structure is scored with numbers that are searched before the first rung of the race: with
# those that a program was written with, the best numbers win, and not the best structure. The race
# keeps ten programs, so that the mean of the ten best is one of complete scores. A search stops
# when it has used the budget; the further iterations are for those that find little that is new.
SHARED = (
    "iterations=20",
    "generation.samples=32",
    "score=tuned",
    "tuning.structures={rungs: 1, steps: 40, candidates: 1}",
    "race.winners=10",
    "baselines={}",
    "controls=null",
    "test.ablations=0",
)
_MEMORY = (
    "generation.prompt=short-memory",
    "generation.memory={programs: 2}",
    "generation.decoding.buckets=[10, 192, 320]",
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of the comparison.

    Attributes:
        name: its name in the table and in file names.
        settings: assignments such as "training.enabled=false", after those that all arms share.
        random: whether its programs are random ones of the grammar, not the generator's.
        against: name of the arm whose difference from it is shown; empty for none.
    """

    name: str
    settings: tuple[str, ...]
    random: bool = False
    against: str = ""


_UNTRAINED = ("training.enabled=false", "generation.memory=null", "generation.prompt=short")
_TRAINED = ("training.enabled=true", "generation.memory=null", "generation.prompt=short")
_MEMORY_ALONE = ("training.enabled=false", *_MEMORY)
_BOTH = ("training.enabled=true", *_MEMORY)

# The arms that run by default.
MAIN_ARMS = (
    Arm(name="random", settings=_UNTRAINED, random=True),
    Arm(name="untrained", settings=_UNTRAINED, against="random"),
    Arm(name="trained", settings=_TRAINED, against="untrained"),
    Arm(name="memory", settings=_MEMORY_ALONE, against="untrained"),
    Arm(name="memory-trained", settings=_BOTH, against="memory"),
)
_WRITTEN = ("score=as_written",)
_HOT = ("generation.temperature=1.0",)
# Untrained arms with other scores, or at another temperature than the demo's.
UNTRAINED_ARMS = (
    Arm(name="memory-written", settings=(*_MEMORY_ALONE, *_WRITTEN), against="memory"),
    Arm(name="memory-1.0", settings=(*_MEMORY_ALONE, *_HOT), against="memory"),
    Arm(name="untrained-1.0", settings=(*_UNTRAINED, *_HOT), against="untrained"),
)
_REFUSED = ("selection.refused=true",)
_FORWARD_KL = ("training.loss=forward_kl", "training.beta=0.4")
_FROM_FIRST = ("training.start=first", "selection.iterations=all")
# Settings of the training to choose from, each with memory; see README.md.
TRAINING_ARMS = tuple(
    Arm(name=name, settings=(*_BOTH, *settings), against="memory-trained")
    for name, settings in {
        "refused": _REFUSED,
        "forward-kl": _FORWARD_KL,
        "from-first": _FROM_FIRST,
        "evotune": (*_REFUSED, *_FORWARD_KL, *_FROM_FIRST, "training.nll_weight=1"),
        "capped": ("selection.max_pairs_per_chosen=2",),
        "entropic": ("training.objective=entropic", "training.nll_weight=0"),
        "beta-0.5": ("training.beta=0.5",),
        "rate-1e-4": ("training.learning_rate=1e-4",),
    }.items()
)
KNOWN = {arm.name: arm for arm in (*MAIN_ARMS, *UNTRAINED_ARMS, *TRAINING_ARMS)}


def parse_arm(words: Sequence[str]) -> Arm:
    """Return an arm of the command line: its name, the arm that it changes, and assignments.

    Args:
        words: such as ["slow", "memory-trained", "training.learning_rate=1e-4"].

    Raises:
        UserError: a name that is taken or not suitable for a file, or an unknown arm.
    """
    name, *rest = words
    if name in KNOWN or name == CONTROLS or not name.replace("-", "").replace(".", "").isalnum():
        raise UserError(
            f"--arm {name}: is an existing arm, or not made of letters, digits, - and .; choose "
            "another name"
        )
    if not rest or rest[0] not in KNOWN:
        raise UserError(f"--arm {name}: give the arm to change next, one of {', '.join(KNOWN)}")
    base = KNOWN[rest[0]]
    return Arm(
        name=name,
        settings=(*base.settings, *rest[1:]),
        random=base.random,
        against=base.name,
    )


def chosen_arms(names: Sequence[str], own: Sequence[Sequence[str]]) -> list[Arm]:
    """Return the arms to run.

    Args:
        names: names of arms; by default those of `MAIN_ARMS`.
        own: the words of each --arm.

    Raises:
        UserError: an unknown arm; see also `parse_arm`.
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise UserError(f"--arms {unknown[0]}: no such arm; choose from {', '.join(KNOWN)}")
    default = [] if own else list(MAIN_ARMS)
    return ([KNOWN[name] for name in names] or default) + [parse_arm(words) for words in own]
