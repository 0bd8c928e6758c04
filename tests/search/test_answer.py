"""The run's answer: which programs and controls it compares, and what it says."""

import dataclasses

import pytest

from sdjax.evaluation.statistics import paired_by_key
from sdjax.evaluation.task import Outcome
from sdjax.report import final_table
from sdjax.report.data import read_report
from sdjax.report.page import render
from sdjax.search.answer import compute_answer, read_answer, save_answer
from sdjax.search.final_test import record_opening
from sdjax.search.ranking import final_ranking, finalists
from sdjax.search.score_types import Answer, TestOpening
from sdjax.search.store import Store
from sdjax.search.types import Entry, Program, Setting, program_entry


def solved(skill, count):
    """Return outcomes of which the first `skill` percent are correct."""
    return [
        Outcome(problem_id=f"p{n}", output="", strict=n < skill * count, flexible=True)
        for n in range(count)
    ]


def program(name, constants):
    """Return a program with some constants that can be tuned."""
    terms = [f"0.{n + 2} * x" for n in range(constants)] or ["x"]
    return (
        f"def merge_models(task_vectors):  # {name}\n"
        f"    x = task_vectors['expert_1']\n"
        f"    return {' + '.join(terms)}\n"
    )


@pytest.fixture
def run(tmp_path):
    """Return a function that stores entries with their scores by split."""
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        store.save_setting(Setting(seed="s", slots={"expert_1": "a"}, scope="mlp", task="t"))

        def save(*rows):
            for name, numbers, *scores in rows:
                tuned = {"constants": numbers}
                if name.startswith("method:"):
                    grid = {"hyperparameters": {f"h{n}": 0.5 for n in range(numbers)}}
                    detail = tuned if name.endswith("tuned") else grid
                    entry = Entry(name=name, kind="method", detail=detail)
                else:
                    name, _, original = name.partition(" from ")
                    detail = tuned | {"tuned_from": original} if original else {}
                    store.save(Program(identity=name, source=program(name, numbers)))
                    entry = Entry(
                        name=program_entry(name), kind="program", identity=name, detail=detail
                    )
                store.save(entry)
                splits = (("development", 200), ("confirmation", 200), ("test", 400))
                for (split, count), score in zip(splits, scores, strict=False):
                    if score is not None:
                        store.save_scores(entry.name, split, solved(score, count))
            return store

        yield save


CONTROLS = (
    ("method:grid", 0, 0.70, None, 0.70),
    ("method:weights, tuned", 3, 0.80, None, 0.80),
    ("method:layers, tuned", 12, 0.90, None, 0.90),
)


def test_each_form_is_compared_with_a_control_of_at_most_as_many_numbers(run):
    store = run(
        *CONTROLS,
        ("b2", 0, 0.75, None, 0.705),
        ("a1 from b2", 4, 0.85, None, 0.84),
        ("c3", 0, 0.74, None, 0.70),
    )
    answer, comparisons = compute_answer(store, "strict")
    assert (answer.tuned, answer.written) == ("program:a1", "program:b2")
    assert answer.selected_by == "development"
    tuned, written, other = comparisons
    assert (tuned.program, tuned.control) == ("program:a1", "method:weights, tuned")
    assert (written.program, written.control) == ("program:b2", "method:grid")
    assert (other.program, other.gain) == ("program:c3", 0)
    # Holm: the smallest p-value at 5 % / 3, the next at 5 % / 2, where the procedure stops.
    assert tuned.p_value < 0.05 / 3 < 0.05 / 2 < written.p_value < other.p_value
    assert [one.confidence for one in comparisons] == [1 - 0.05 / 3, 1 - 0.05 / 2, 1 - 0.05 / 2]
    gain = paired_by_key(
        {o.problem_id: float(o.strict) for o in solved(0.84, 400)},
        {o.problem_id: float(o.strict) for o in solved(0.80, 400)},
        1 - 0.05 / 3,
    )
    assert dataclasses.astuple(tuned.interval) == pytest.approx(dataclasses.astuple(gain))
    assert answer.sentence == (
        "Discovered as tuned only: the best program, program a1, tuned from b2: as tuned "
        f"(4 numbers) minus weights, tuned (3 numbers) {gain.in_percent(signed=True)}, "
        f"as written minus grid {written.interval.in_percent(signed=True)} "
        "points on 400 test problems (against the best control with at most as many numbers; "
        "95 % intervals, paired by problem, by Holm's procedure for 3 finalists)"
    )


def test_numbers_count_whoever_chose_them(run):
    store = run(
        ("method:dare", 2, 0.85, None, 0.85),
        *CONTROLS,
        ("a1", 4, 0.86, None, 0.86),
        ("b2", 2, 0.85, None, 0.86),
        ("c3", 1, 0.84, None, 0.86),
    )
    _, comparisons = compute_answer(store, "strict")
    assert [(one.program_numbers, one.control, one.control_numbers) for one in comparisons] == [
        (4, "method:dare", 2),
        (2, "method:dare", 2),
        (1, "method:grid", 0),
    ]


def test_program_that_is_named_is_the_one_that_is_ranked_first(run):
    store = run(
        *CONTROLS,
        ("method:other, tuned", 3, 0.79, 0.82, 0.80),
        ("b2", 4, 0.80, 0.85, 0.84),
        ("a1 from b2", 4, 0.90, 0.82, 0.80),
    )
    report = read_report(store)
    assert [one.program for one in report.comparisons] == ["program:b2", "program:a1"]
    (starred,) = [row for row in report.tables["main"] if row.is_answer]
    assert starred.name == "program:b2"
    written, tuned = (one.interval.in_percent(signed=True) for one in report.comparisons)
    assert report.answer.sentence.startswith(
        "Discovered as written only: the best program, program b2, tuned to program a1: as written "
        f"(4 numbers) minus other, tuned (3 numbers) {written}, as tuned (4 numbers) minus other, "
        f"tuned (3 numbers) {tuned} points"
    )
    assert (report.answer.written, report.answer.tuned) == ("program:b2", "program:a1")
    # The method that programs are compared with is selected as the controls of the answer are.
    assert report.best_method == "method:other, tuned"
    assert "The best method by confirmation score is\nother, tuned" in render(store)


def test_every_table_says_which_program_was_tuned(run):
    store = run(*CONTROLS, ("b2", 4, 0.80, 0.85, 0.84), ("a1 from b2", 4, 0.90, 0.82, 0.80))
    page = render(store)
    for start, end in (
        ("best control with at most as many</th>", "Differences on the test"),  # the comparisons
        ("Differences on the test", "Wilson intervals"),  # the ranking
        ("<h2>The best programs</h2>", "<h2>Configuration"),
    ):
        section = page.partition(start)[2].partition(end)[0]
        assert section.count("program a1 (tuned b2)") == 1
        assert section.count("program b2") == 1
    table, *notes = final_table(store).renderables[1:]
    assert {"program a1 (tuned b2)", "program b2"} <= {str(x) for x in table.columns[1].cells}
    assert any("(tuned ID): program ID with tuned numbers" in str(note) for note in notes)


@pytest.mark.parametrize(("skill", "discovered"), [(0.8025, False), (0.79, False), (0.84, True)])
def test_discovered_is_said_only_if_the_interval_is_above_zero(run, skill, discovered):
    store = run(*CONTROLS, ("a1 from z", 3, 0.85, None, skill), ("b2 from y", 20, 0.84, None, 0.99))
    answer, (best, _) = compute_answer(store, "strict")
    assert best.program == "program:a1"  # by development score, whatever the test says
    assert answer.is_discovery == (best.low > 0) == discovered
    assert answer.sentence.startswith("Discovered: " if discovered else "Nothing discovered: ")


def test_confirmation_scores_choose_program_and_control(run):
    store = run(
        ("method:grid", 0, 0.70, 0.72, 0.70),
        ("method:other", 0, 0.71, 0.70, 0.60),
        ("a1", 0, 0.85, 0.80, 0.80),
        ("b2", 0, 0.84, 0.81, 0.70),
        ("c3", 0, 0.99, None, None),  # found after the others were confirmed
    )
    assert [entry.name[-2:] for entry in final_ranking(store, "strict")] == ["b2", "a1", "c3"]
    assert [entry.name[-2:] for entry in finalists(store, "strict", 2)] == ["c3", "a1", "b2"]
    answer, comparisons = compute_answer(store, "strict")
    assert (answer.written, answer.tuned) == ("program:b2", None)
    assert [one.control for one in comparisons] == ["method:grid"] * 2
    assert answer.selected_by == "confirmation"
    assert not answer.is_discovery


def test_earlier_bests_are_neither_ranked_first_nor_compared(run):
    store = run()
    record_opening(store, ["method:grid", "program:a1"], "main", ["program:b2"])
    # b2 was the best one of the first programs
    run(CONTROLS[0], ("a1", 0, 0.85, 0.80, 0.80), ("b2", 0, 0.60, 0.90, 0.99))
    assert [entry.name for entry in final_ranking(store, "strict")] == ["program:a1", "program:b2"]
    answer, comparisons = compute_answer(store, "strict")
    assert answer.written == "program:a1"
    assert [one.program for one in comparisons] == ["program:a1"]
    record_opening(store, ["method:grid", "program:a1"], "main", ["program:b2"])
    assert len(store.select(TestOpening)) == 1


def test_only_tested_entries_are_compared(run):
    store = run(CONTROLS[0], ("a1", 0, 0.9, None, None))
    assert compute_answer(store, "strict") == (None, ())
    assert not any("There is no answer" in text for text in read_report(store).missing)
    store = run(("b2", 0, 0.95, None, 0.8))
    answer, (comparison,) = compute_answer(store, "strict")
    assert comparison.program == answer.written == "program:b2"
    assert answer.sentence.endswith("95 % intervals, paired by problem)")


def test_answer_is_kept_with_every_opening_of_the_test(run):
    store = run(CONTROLS[0], ("a1", 0, 0.8, None, 0.8))
    record_opening(store, {"method:grid": None, "program:a1": "a1"}, "main")
    record_opening(store, {"method:grid": None, "program:a1": "a1"}, "main")
    (first,) = store.select(TestOpening)
    assert (first.number, first.entries) == (1, ("method:grid", "program:a1"))
    save_answer(store, "strict")
    run(("b2", 0, 0.9, None, 0.9))
    record_opening(store, {"method:grid": None, "program:b2": "b2"}, "main")
    save_answer(store, "strict")
    assert [one.entries for one in store.select(TestOpening)] == [first.entries, ("program:b2",)]
    answer, comparisons = read_answer(store, "strict")
    assert [one.opening for one in store.select(Answer)] == [1, 2]
    assert answer == store.select(Answer)[1]
    assert [one.program for one in comparisons] == ["program:b2", "program:a1"]
    assert answer.sentence.endswith("; the test was opened 2 times)")


def test_what_an_earlier_version_tested_counts_as_one_opening(run):
    store = run(CONTROLS[0], ("a1", 0, 0.8, None, 0.8))
    record_opening(store, {"method:grid": None, "program:b2": "b2"}, "main")
    assert [(one.number, one.entries) for one in store.select(TestOpening)] == [
        (1, ("method:grid", "program:a1")),
        (2, ("program:b2",)),
    ]


def test_run_without_controls_says_that_it_has_no_answer(run):
    store = run(("a1", 0, 0.8, 0.8, 0.8), ("method:weights, tuned", 3, 0.7, 0.7, 0.7))
    assert compute_answer(store, "strict") == (None, ())
    assert any("There is no answer" in text for text in read_report(store).missing)
