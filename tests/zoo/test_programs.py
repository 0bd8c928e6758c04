"""Merge programs that the seed is trained on, and their prompts."""

import collections

import pytest

from sdjax.programs.prompts import find_prompt
from sdjax.zoo.programs import SLOTS, program_texts


@pytest.fixture(scope="module")
def texts():
    return program_texts(300, 5)


def test_half_of_the_prompts_have_no_memory(texts):
    counts = collections.Counter(len(text.memory.programs) for text in texts)
    assert counts[0] == 150
    assert counts[1] >= 30
    assert counts[2] >= 60
    short = find_prompt("short").render(slots=SLOTS, descriptions={})
    assert {text.prompt for text in texts if not text.memory.programs} == {short}


def test_prompts_show_the_programs_with_ascending_scores(texts):
    for text in texts:
        scores = [program.score for program in text.memory.programs]
        assert scores == sorted(scores)
        assert all(0 < score < 100 for score in scores)
        for program in text.memory.programs:
            assert f"# {program.score:.0f}%\n{program.source}" in text.prompt
            assert text.source != program.source


def test_children_continue_from_the_best_program(texts):
    """Most lines of a child are lines of the best program, unless it explores."""

    def kept(child: str, program: str) -> float:
        lines = child.splitlines()
        return sum(line in program.splitlines() for line in lines) / len(lines)

    children = [t for t in texts if t.memory.operation in ("improve", "combine", "simplify")]
    pairs = [t for t in children if len(t.memory.programs) == 2]
    best = [kept(t.source, t.memory.programs[1].source) for t in pairs]
    other = [kept(t.source, t.memory.programs[0].source) for t in pairs]
    assert sum(best) / len(best) > sum(other) / len(other) + 0.1


def test_programs_are_distinct_and_reproducible(texts):
    sources = [text.source for text in texts]
    assert len(set(sources)) == len(sources)
    assert program_texts(40, 5) == texts[:40]
