import dataclasses
import random

import pytest

from sdjax.evaluation.statistics import paired_by_key
from sdjax.evaluation.task import Outcome
from sdjax.report import final_table
from sdjax.report.data import read_report
from sdjax.report.generators import generator_rows
from sdjax.report.page import render
from sdjax.report.results import cut_middle, final_rows, shown_metrics
from sdjax.search.entry_names import display_name
from sdjax.search.score_types import Application, StoredPair
from sdjax.search.types import Entry, Program, Sample, program_entry


def test_counts_and_reasons_of_the_samples(finished):
    for one in read_report(finished).iterations:
        judged = finished.judged(one.iteration)
        assert one.samples == len(judged) == 64
        assert one.admissible == sum(s.status in ("admitted", "duplicate") for s in judged)
        assert one.novel == len(one.scores) == len({s.identity for s in judged if s.novel})
        best = sorted(one.scores, reverse=True)[:10]
        assert one.top_mean == pytest.approx(sum(best) / len(best))
        assert one.unique_scores == len({*one.scores})
        assert sum(one.reasons.values()) == one.samples - one.admissible
        assert any(reason.startswith("refused: ") for reason in one.reasons)
        assert one.reasons["no program: no program in the text"] > 0
        assert 0 < one.unseen < 1
        assert (
            one.training["pairs"] == len(finished.select(StoredPair, iteration=one.iteration)) > 0
        )


def test_duplicate_has_the_score_of_its_original(finished):
    (first, *_) = read_report(finished).iterations
    scores = {one.entry: one.strict for one in finished.summaries("development")}
    original_scores = [
        scores[program_entry(s.identity)]
        for s in finished.judged(1)
        if s.status in ("admitted", "duplicate")
    ]
    assert len(original_scores) > len(first.scores)
    assert first.sample_mean == pytest.approx(sum(original_scores) / len(original_scores))


def test_reference_lines_are_the_best_development_scores(finished):
    lines = {line.name: line.score for line in read_report(finished).references}
    assert set(lines) == {
        "seed",
        "best expert",
        "best method, paper grid",
        "best method, fine grid",
    }
    assert lines["best method, fine grid"] >= lines["best method, paper grid"]


def test_final_table_is_paired_with_the_seed_by_problem(finished):
    rows = read_report(finished).tables["main"]
    assert [row.kind for row in rows] == ["seed"] + ["expert"] * 2 + ["method"] * 3 + [
        "program"
    ] * 5
    assert rows[0].strict_gain is None
    programs = [row.development for row in rows if row.kind == "program"]
    assert programs == sorted(programs, reverse=True)
    best, seed = (
        {o.problem_id: o.flexible for o in finished.outcomes(name, "test")}
        for name in (rows[-1].name, "seed")
    )
    assert rows[-1].flexible_gain == paired_by_key(best, seed)
    assert rows[-1].strict.mean <= rows[-1].flexible.mean


def test_programs_are_paired_with_the_best_method_of_the_development_problems(finished):
    report = read_report(finished)
    rows = report.tables["main"]
    methods = {row.name: row.development for row in rows if row.kind == "method"}
    assert report.best_method == max(methods, key=methods.get)
    assert {row.kind for row in rows if row.method_gain is not None} == {"program"}
    best, method = (
        {o.problem_id: o.strict for o in finished.outcomes(name, "test")}
        for name in (rows[-1].name, report.best_method)
    )
    assert rows[-1].method_gain == paired_by_key(best, method)
    (answer,) = [row for row in rows if row.is_answer]
    assert display_name(answer.name) in report.answer.sentence
    assert str(final_table(finished).renderables[0]) == report.answer.sentence
    compared = f"vs. the best method by development score, {display_name(report.best_method)}: "
    notes = final_table(finished, "transfer").renderables
    assert any(compared in str(note) for note in notes)


def test_every_setting_is_sorted_by_the_development_score_of_the_search(finished):
    tables = read_report(finished).tables
    scores = {one.entry: one.strict for one in finished.summaries("development")}
    for rows in tables.values():
        programs = [row for row in rows if row.kind == "program"]
        assert [row.rank for row in programs] == [1, 2, 3, 4, 5]
        assert [row.development for row in programs] == [scores[row.name] for row in programs]
        assert [row.name for row in rows if row.is_answer] == [programs[0].name]
        assert all(row.rank is None for row in rows if row.kind != "program")
    names = [[row.name for row in rows if row.kind != "expert"] for rows in tables.values()]
    assert names[0] == names[1]
    # The experts of the transfer are other models than those with a development score.
    assert {row.development for row in tables["transfer"] if row.kind == "expert"} == {None}


def test_equal_metrics_are_shown_once(tmp_path, made_up):
    with made_up.new_store(tmp_path) as store:
        for name in ("seed", "expert_1"):
            store.save(Entry(name=name, kind=name.split("_")[0]))
            correct = [Outcome(problem_id=p, output="", strict=True, flexible=True) for p in "ab"]
            store.save_scores(name, "test", correct)
        rows = final_rows(store, "main", "strict")
        assert shown_metrics(rows, "strict") == ("strict",)
        headers = [str(column.header) for column in final_table(store).renderables[0].columns]
        assert headers == ["rank", "name", "dev.", "test", "vs. seed [95 %]"]
        page = render(store)
        assert "strict and flexible accuracy are equal" in page.lower()
        assert page.count("minus seed") == 1


def test_answer_keeps_its_rank_and_mark_if_it_was_not_tested_first(tmp_path, made_up):
    """Check a run that was extended: programs of lower rank were tested, too."""
    rng = random.Random(4)
    with made_up.new_store(tmp_path) as store:
        made_up.add_iteration(store, rng, 1, size=16)
        made_up.add_test(store, rng)
        before = {row.rank: row.name for row in final_rows(store, "main", "strict")}
        best = "f" * 64
        store.save(Program(identity=best, source=""))
        store.save(Entry(name=f"program:{best}", kind="program", identity=best))
        for split, count in (("development", 200), ("test", 400)):
            store.save_scores(f"program:{best}", split, made_up.outcomes(rng, 2.0, count))
        after = {row.rank: row.name for row in final_rows(store, "main", "strict")}
    assert after == {1: f"program:{best}"} | {rank + 1: name for rank, name in before.items()}


def test_no_difference_between_different_problems(tmp_path, made_up):
    with made_up.new_store(tmp_path) as store:
        for name, problem in (("seed", "p1"), ("expert_1", "p2")):
            store.save(Entry(name=name, kind=name.split("_")[0]))
            outcome = Outcome(problem_id=problem, output="", strict=True, flexible=True)
            store.save_scores(name, "test", [outcome])
        assert [row.strict_gain for row in read_report(store).tables["main"]] == [None, None]


def test_missing_results_are_listed(tmp_path, made_up):
    rng = random.Random(0)
    with made_up.new_store(tmp_path) as store:
        empty = read_report(store)
        assert empty.iterations == empty.best == empty.references == ()
        assert len(empty.missing) == 3
        made_up.add_iteration(store, rng, 1, size=16)
        made_up.add_baselines(store, rng)
        missing = " ".join(read_report(store).missing)
        assert "unfinished" in missing
        assert "1 of 3 iterations" in missing
        assert "test problems yet" in missing


def test_incomplete_evaluation_is_ignored(tmp_path, made_up):
    with made_up.new_store(tmp_path) as store:
        store.save(Entry(name="seed", kind="seed"))
        outcome = Outcome(problem_id="p", output="", strict=True, flexible=True)
        store.save_scores("seed", "test", [outcome], complete=False)
        store.save_scores("seed", "development", [outcome], complete=False)
        report = read_report(store)
        assert report.tables == {}
        assert report.references == ()


def test_program_refused_on_application_is_among_the_reasons(tmp_path, made_up):
    with made_up.new_store(tmp_path) as store:
        made_up.add_iteration(store, random.Random(0), 1, size=8)
        (first, *_) = [s.identity for s in store.judged() if s.novel]
        before = read_report(store).iterations[0]
        store.save(
            Application(
                entry=program_entry(first),
                verdict="too costly",
                rule="loop-iterations",
                change=0.0,
            )
        )
        after = read_report(store).iterations[0]
        assert after.novel == before.novel - 1
        assert any(reason.startswith("too costly") for reason in after.reasons)


def test_long_names_are_cut_in_the_middle():
    assert cut_middle("dare_linear(density=0.5,weight=0.3)", 20) == "dare_linea…ight=0.3)"
    assert cut_middle("abcdef", 2) == "a…"
    assert cut_middle("short", 5) == "short"


def test_display_names():
    assert display_name("program:0123456789abcdef") == "program 01234567"
    assert display_name("program:0123456789", "fedcba9876") == "program 01234567 (tuned fedcba98)"
    assert display_name("method:ties(density=0.4)") == "ties(density=0.4)"
    assert display_name("expert_1") == "expert 1"


def test_generators_are_compared_if_there_are_several(finished):
    samples = finished.judged(1)
    scores = {sample.identity: 0.1 * n for n, sample in enumerate(samples) if sample.novel}
    assert generator_rows(samples, scores) == ()
    both = [
        dataclasses.replace(sample, generator="<i>gpt" if number % 3 else "seed")
        for number, sample in enumerate(samples)
    ]
    seed, gpt = generator_rows(both, scores)
    assert (seed.name, gpt.name) == ("seed", "<i>gpt")
    assert seed.samples + gpt.samples == len(samples)
    assert seed.distinct + gpt.distinct == len(scores)
    assert max(seed.best, gpt.best) == max(scores.values())
    assert gpt.admissible == sum(one.admissible for one in both if one.generator != "seed")
    (none,) = (row for row in generator_rows(both, {}) if row.name == "seed")
    assert none.best is None


def test_page_shows_the_generators(tmp_path, made_up):
    with made_up.new_store(tmp_path) as store:
        prompt = store.save_prompt("short", "def")
        for number, generator in enumerate(("seed", "<i>gpt")):
            store.save(
                Sample(
                    iteration=1,
                    number=number,
                    prompt=prompt,
                    text="nothing",
                    tokens=(),
                    stopped=True,
                    source=None,
                    generator=generator,
                )
            )
        page = render(store)
    assert "<h3>Generators</h3>" in page
    assert "<td>&lt;i&gt;gpt</td>" in page
