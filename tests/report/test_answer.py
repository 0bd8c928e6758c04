"""The run's answer: which programs and controls it compares, and what it says."""

import dataclasses

import pytest

from sdjax.evaluation.statistics import paired_by_key
from sdjax.evaluation.task import Outcome
from sdjax.report.answer import read_answers
from sdjax.search.types import Entry, Program, program_entry


def solved(skill, count=400):
    """Return outcomes of which the first `skill` percent are correct."""
    return [
        Outcome(problem_id=f"p{n}", output="", strict=n < skill * count, flexible=True)
        for n in range(count)
    ]


@pytest.fixture
def run(made_up, tmp_path):
    """Return a function that stores entries as (name, kind, numbers, development, test)."""
    with made_up.new_store(tmp_path) as store:

        def save(*rows):
            for name, kind, numbers, development, test in rows:
                identity = None
                if kind == "program":
                    identity, name = name, program_entry(name)
                    store.save(Program(identity=identity, source=f"# {identity}"))
                detail = {"constants": numbers} if numbers else {}
                store.save(Entry(name=name, kind=kind, identity=identity, detail=detail))
                store.save_scores(name, "development", solved(development, 200))
                if test is not None:
                    store.save_scores(name, "test", solved(test))
            return store

        yield save


CONTROLS = (
    ("method:grid", "method", 0, 0.70, 0.70),
    ("method:weights, tuned", "method", 3, 0.80, 0.80),
    ("method:layers, tuned", "method", 12, 0.90, 0.90),
)


def test_tuned_program_is_compared_with_a_control_of_at_most_as_many_numbers(run):
    store = run(*CONTROLS, ("a1", "program", 4, 0.85, 0.84), ("b2", "program", 0, 0.75, 0.74))
    tuned, written = read_answers(store, "strict")
    assert (tuned.program, tuned.control) == ("program:a1", "method:weights, tuned")
    assert (written.program, written.control) == ("program:b2", "method:grid")
    difference = paired_by_key(
        {o.problem_id: float(o.strict) for o in solved(0.84)},
        {o.problem_id: float(o.strict) for o in solved(0.80)},
        1 - 0.05 / 2,
    )
    assert dataclasses.astuple(tuned.gain) == pytest.approx(dataclasses.astuple(difference))
    assert tuned.finalists == 2
    assert tuned.sentence().startswith("Discovered: the best program, program a1 (4 tuned numbers)")
    assert "weights, tuned (3 tuned numbers): +4.0 [" in tuned.sentence()
    assert "corrected for 2 tested programs" in tuned.sentence()
    assert "(as written)" in written.sentence()


def test_nothing_is_discovered_unless_the_interval_is_above_zero(run):
    store = run(*CONTROLS, ("a1", "program", 3, 0.85, 0.8025), ("b2", "program", 20, 0.84, 0.99))
    (answer,) = read_answers(store, "strict")
    assert answer.program == "program:a1"  # by development score, whatever the test says
    assert answer.gain.mean > 0 > answer.gain.low
    assert answer.sentence().startswith("Nothing discovered: ")


def test_only_tested_entries_are_compared(run):
    store = run(CONTROLS[0], ("a1", "program", 0, 0.9, None))
    assert read_answers(store, "strict") == ()
    store = run(("b2", "program", 0, 0.8, 0.8))
    (answer,) = read_answers(store, "strict")
    assert answer.program == "program:b2"
    assert dataclasses.replace(answer, finalists=1).sentence().endswith("on the test problems")
