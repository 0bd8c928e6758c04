"""Regular expressions from others, matched in time linear in the text.

Python's `re` backtracks: `(a+)+$` takes hours on forty letters. Here, patterns become one automaton
whose states are followed side by side (Thompson 1968, doi:10.1145/363347.363387), so nothing is
tried twice. Lookaround, back references and flags, which an automaton cannot do, are refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn, TypeAlias

from sdjax.core.errors import truncated_repr

MAX_PATTERN_LENGTH = 1_000
MAX_GROUPS = 50  # nested
MAX_STATES = 20_000  # of all patterns; a repetition {9} has nine copies
MAX_WORK = 2_000_000  # visits of states in all matches, a few seconds

_LITERAL = re.compile(r"[\w-]+(?:\.[\w-]+)*")  # a dot between names is taken to be a dot
_REPETITION = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
_CLASS = re.compile(r"\[\^?(?:\\.|\])?(?:\\.|[^\]\\])*\]", re.DOTALL)
_CLASS_ESCAPES = "dDsSwW"


class _State(NamedTuple):
    """A state of the automaton.

    Attributes:
        next: the following states.
        test: whether a character leads to them; None if no character is read.
        only_at: None, or "^" or "$", where alone they can be reached.
    """

    next: tuple[int, ...]
    test: Callable[[str], object] | None = None
    only_at: str | None = None


# Adds states that lead to a state, and returns the first of them.
_Node: TypeAlias = Callable[[int], int]


class PatternList:
    """Regular expressions, of which the first that matches a dotted name or the end of it counts.

    The end of a name starts after a dot, as in PEFT: `q_proj` matches `layers.0.q_proj`.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        """Compile the patterns.

        Raises:
            ValueError: a pattern is invalid, too long, or has a construct that is not supported.
        """
        self._literals: dict[str, int] = {}
        self._states: list[_State] = []
        self._accepting: dict[int, int] = {}
        self._steps: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}
        self._work = 0
        starts = []
        for index, pattern in enumerate(patterns):
            if _LITERAL.fullmatch(pattern):
                self._literals.setdefault(pattern, index)
            else:
                accepting = _add(self._states, _State(()))
                self._accepting[accepting] = index
                starts.append(_Parser(pattern, self._states).parse()(accepting))
        skip = len(self._states)  # reads what precedes the end of a name, up to a dot
        self._states.append(_State((skip, skip + 1), lambda character: True))
        self._states.append(_State(tuple(starts), lambda character: character == "."))
        self._first = (skip, skip + 1, *starts)

    def first_match(self, name: str) -> int | None:
        """Return the index of the first pattern that matches a name or its end; None if none does.

        Raises:
            ValueError: all matches together take too long.
        """
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = [self._literals[end] for end in ends if end in self._literals]
        if self._accepting:
            found += self._automaton_matches(name)
        return min(found, default=None)

    def _automaton_matches(self, name: str) -> list[int]:
        states = self._reachable(self._first, first=True, last=not name)
        for position, character in enumerate(name):
            last = position + 1 == len(name)
            key = (states, character, last)
            if key not in self._steps:
                tested = [self._states[state] for state in states]
                self._steps[key] = self._reachable(
                    [
                        following
                        for state in tested
                        if state.test is not None and state.test(character)
                        for following in state.next
                    ],
                    first=False,
                    last=last,
                )
            states = self._steps[key]
        return [self._accepting[state] for state in states if state in self._accepting]

    def _reachable(self, states: Sequence[int], *, first: bool, last: bool) -> frozenset[int]:
        """Return the states that are reached without reading a character."""
        reached, pending = set(), list(states)
        while pending:
            number = pending.pop()
            if number in reached:
                continue
            state = self._states[number]
            if (state.only_at == "^" and not first) or (state.only_at == "$" and not last):
                continue
            reached.add(number)
            if state.test is None:
                pending.extend(state.next)
        self._work += len(reached) + 1
        if self._work > MAX_WORK:
            raise ValueError("matching takes too long; use fewer or simpler patterns")
        return frozenset(reached)


def _add(states: list[_State], state: _State) -> int:
    if len(states) >= MAX_STATES:
        raise ValueError("too many repetitions or patterns; use fewer")
    states.append(state)
    return len(states) - 1


class _Parser:
    """Recursive-descent parser of one pattern."""

    def __init__(self, pattern: str, states: list[_State]) -> None:
        self._pattern = pattern
        self._states = states
        self._position = 0
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ValueError(f"a pattern of {len(pattern):,} characters")

    def parse(self) -> _Node:
        node = self._alternatives(0)
        if self._position < len(self._pattern):
            self._fail("unbalanced parenthesis")
        return node

    def _alternatives(self, depth: int) -> _Node:
        if depth > MAX_GROUPS:
            self._fail(f"more than {MAX_GROUPS} nested groups")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))

        def build(following: int) -> int:
            starts = tuple(branch(following) for branch in branches)
            return starts[0] if len(starts) == 1 else _add(self._states, _State(starts))

        return build

    def _sequence(self, depth: int) -> _Node:
        nodes = []
        while self._position < len(self._pattern) and self._pattern[self._position] not in "|)":
            nodes.append(self._repeated(self._atom(depth)))

        def build(following: int) -> int:
            if not nodes:  # a state, so that the number of repetitions of nothing is limited too
                return _add(self._states, _State((following,)))
            for node in reversed(nodes):
                following = node(following)
            return following

        return build

    def _atom(self, depth: int) -> _Node:
        character = self._pattern[self._position]
        if character == "[":
            match = _CLASS.match(self._pattern, self._position)
            if match is None:
                self._fail("[ without ]")
            return self._character(match[0])
        self._position += 1
        if character == "(":
            if self._take("?") and not self._take(":"):
                self._fail("(? is not supported, except (?:")
            node = self._alternatives(depth + 1)
            if not self._take(")"):
                self._fail("unbalanced parenthesis")
            return node
        if character in "^$":
            return lambda following: _add(self._states, _State((following,), None, character))
        if character in "*+?":
            self._fail(f"nothing to repeat with {character}")
        self._position -= 1
        if character == "\\":
            escaped = self._pattern[self._position + 1 : self._position + 2]
            if not escaped or (escaped.isalnum() and escaped not in _CLASS_ESCAPES):
                self._fail(f"\\{escaped} is not supported")
            return self._character(character + escaped)
        return self._character(character)

    def _character(self, text: str) -> _Node:
        """Return the node of a class, an escape, a dot or a letter, all of which read one."""
        self._position += len(text)
        if len(text) == 1 and text != ".":
            return lambda following: _add(self._states, _State((following,), text.__eq__))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets within sets
                test = re.compile(text).fullmatch
        except re.error as error:
            self._fail(str(error))
        return lambda following: _add(self._states, _State((following,), test))

    def _repeated(self, node: _Node) -> _Node:
        """Return a node with the repetition that follows it, if one does."""
        match = _REPETITION.match(self._pattern, self._position)
        if self._take("*"):
            least, most = 0, None
        elif self._take("+"):
            least, most = 1, None
        elif self._take("?"):
            least, most = 0, 1
        elif match is not None and (match[1] or match[3]):
            self._position = match.end()
            least = int(match[1] or 0)
            most = least if not match[2] else int(match[3]) if match[3] else None
            if most is not None and most < least:
                self._fail(f"the repetition {match[0]}")
        else:
            return node
        self._take("?")  # a lazy repetition matches the same names
        if self._pattern[self._position : self._position + 1] in ("*", "+", "?"):
            self._fail("multiple repeat")

        def build(following: int) -> int:
            start = following
            if most is None:
                start = _add(self._states, _State(()))
                self._states[start] = _State((node(start), following))
            for _ in range(0 if most is None else most - least):
                start = _add(self._states, _State((node(start), following)))
            for _ in range(least):
                start = node(start)
            return start

        return build

    def _take(self, character: str) -> bool:
        found = self._pattern.startswith(character, self._position)
        self._position += found
        return found

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{truncated_repr(self._pattern)}: {problem}")
