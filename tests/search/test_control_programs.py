"""Control programs: independent of the loop, within the run's budget, resumed, or switched off."""

import contextlib
import dataclasses

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.search import control_programs
from sdjax.search.budget import most_problems, spent
from sdjax.search.comparison_config import ControlsConfig
from sdjax.search.config import read_config
from sdjax.search.control_programs import random_program, try_control_programs
from sdjax.search.control_search import control_settings
from sdjax.search.controls import check_controls, program_controls, samples_of_control
from sdjax.search.loop import run_controls
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.ranking import controls, finalists, programs_of, ranked_programs
from sdjax.search.score_types import Application, Evaluation, StoredOutcome
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    GRAMMAR,
    MAIN,
    NOT_JUDGED,
    RANDOM,
    SEARCH,
    UNTRAINED,
    Entry,
    Lineage,
    Program,
    Sample,
    Setting,
    StoredVerdict,
    program_entry,
    text_hash,
)


@pytest.fixture
def controlled(context):
    """Return the context with control programs, and without tuned controls."""
    config = dataclasses.replace(context.config, controls=ControlsConfig(tuned=()))
    return dataclasses.replace(context, config=config)


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path, config={}, versions={"devices": "4 cpu"}, layers=[]) as store:
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        yield store


def save_samples(context, store, purpose, iteration, sources, first=0):
    prompt = store.save_prompt("short", "def\n")
    samples = (
        Sample(
            purpose=purpose,
            iteration=iteration,
            number=number,
            prompt=prompt,
            text=source,
            tokens=(1,),
            stopped=True,
            source=source,
        )
        for number, source in enumerate(sources, first)
    )
    store.save(*samples)


def judge(context, store, sandbox, *, iteration, purpose=SEARCH):
    """Admit every program, in place of the sandbox."""
    records = []
    for sample in store.judged(iteration, purpose):
        if sample.status == NOT_JUDGED:
            identity = text_hash(sample.source) * 2
            records += [
                StoredVerdict(source=sample.source, verdict="admitted", identity=identity),
                Program(identity=identity, source=sample.source),
            ]
    store.save(*records)


def solve(context, store, sandbox, *, iteration, purpose=SEARCH):
    """Score programs in place of a model: each answers a number of problems of its own."""
    problems = [item.problem.id for item in context.problems[DEVELOPMENT]]
    found = {sample.identity for sample in store.judged()} if purpose != SEARCH else set()
    records = []
    for sample in store.judged(iteration, purpose):
        name = program_entry(sample.identity or "")
        if not sample.novel or sample.identity in found or store.outcomes(name, DEVELOPMENT):
            continue
        skill = int(sample.identity[:4], 16)
        count = len(problems) if skill % 3 == 0 else 6
        complete = count == len(problems)
        key = {"entry": name, "setting": MAIN, "split": DEVELOPMENT}
        outcomes = (
            Outcome(problem_id=one, output="", strict=skill > n * 3000, flexible=True)
            for n, one in enumerate(problems[:count])
        )
        records += [
            Entry(name=name, kind="program", identity=sample.identity),
            Application(entry=name, change=1.0),
            Evaluation(**key, complete=complete),
            *(StoredOutcome(**key, outcome=outcome) for outcome in outcomes),
        ]
    store.save(*records)


@pytest.fixture
def searched(controlled, store, monkeypatch):
    """Return a function that runs the controls of a search that has two scored iterations."""

    def generate(context, store, adapter, *, iteration, count, temperature, purpose):
        temperatures.append(temperature)
        missing = sorted(set(range(count)) - store.sample_numbers(iteration, purpose))
        sources = [random_program(context, 1000 * iteration + number) for number in missing]
        save_samples(context, store, purpose, iteration, sources, first=count - len(missing))

    temperatures = []
    monkeypatch.setattr(control_programs, "generate", generate)
    monkeypatch.setattr(control_programs, "judge", judge)
    monkeypatch.setattr(control_programs, "score_programs", solve)
    for iteration in (1, 2):
        store.save(Lineage(iteration=iteration, generator="zoo:seed", temperature=1.0))
        sources = [random_program(controlled, 100 * iteration + n) for n in range(8)]
        sources[0] = random_program(controlled, 0)  # which the random control finds too
        save_samples(controlled, store, SEARCH, iteration, sources)
        judge(controlled, store, None, iteration=iteration)
        solve(controlled, store, None, iteration=iteration)

    def run():
        try_control_programs(controlled, store, None, PhaseClock(controlled, store))
        return temperatures

    return run


def snapshot(store):
    samples = [
        (one.purpose, one.iteration, one.number, one.text, one.status)
        for purpose in (SEARCH, RANDOM, UNTRAINED)
        for one in store.judged(purpose=purpose)
    ]
    return samples, store.summaries()


def test_random_programs_depend_on_their_number_and_the_seed_alone(context):
    programs = [random_program(context, number) for number in range(20)]
    assert programs == [random_program(context, number) for number in range(20)]
    assert len(set(programs)) > 15
    other = dataclasses.replace(context, config=dataclasses.replace(context.config, rng_seed=9))
    assert random_program(other, 0) != programs[0]


def test_controls_stay_within_the_budget_of_the_search(controlled, store, searched):
    temperatures = searched()
    generation = controlled.config.generation
    assert set(temperatures) == {generation.temperature_at(2)}
    budget = spent(store).problems
    for purpose in (RANDOM, UNTRAINED):
        assert 0 < spent(store, purpose).problems <= budget
        samples = store.judged(purpose=purpose)
        assert 0 < len(samples) <= samples_of_control(controlled.config, purpose)
        left = budget - spent(store, purpose).problems
        all_sampled = len(samples) == samples_of_control(controlled.config, purpose)
        assert all_sampled or left < len(controlled.problems[DEVELOPMENT])
    assert {one.generator for one in store.judged(purpose=RANDOM)} == {GRAMMAR}
    assert [one.source for one in store.judged(purpose=RANDOM)] == [
        random_program(controlled, number) for number in range(len(store.judged(purpose=RANDOM)))
    ]


def test_shared_programs_keep_one_outcome_and_count_for_both(store, searched):
    before = store.summaries()
    searched()
    after = {summary.entry: summary for summary in store.summaries()}
    assert [after[summary.entry] for summary in before] == before
    shared = program_entry(store.judged(1)[0].identity)
    first = program_entry(store.judged(purpose=RANDOM)[0].identity)
    assert first == shared
    for purpose in (SEARCH, RANDOM, UNTRAINED):  # the first iteration is untrained
        assert shared in programs_of(store, purpose)
    own = programs_of(store, SEARCH)
    assert own == {program_entry(s.identity) for s in store.judged() if s.identity}
    ranked = {entry.name for entry in ranked_programs(store, "strict")}
    assert ranked <= own
    assert programs_of(store, RANDOM) - own
    assert controls(store) == programs_of(store, RANDOM) | programs_of(store, UNTRAINED)
    best = finalists(store, "strict", 2, RANDOM)
    assert best == ranked_programs(store, "strict", RANDOM)[:2]


@pytest.mark.parametrize("interrupted", ["score_programs", "generate"])
def test_interrupted_controls_give_the_same_programs(
    controlled, store, searched, tmp_path, monkeypatch, interrupted
):
    with Store.open(tmp_path) as start:
        content = start.content()
    searched()
    expected = snapshot(store)
    searched()
    assert snapshot(store) == expected  # nothing is left to do

    with Store.mirror(tmp_path, content) as second:
        function, calls = getattr(control_programs, interrupted), iter(range(100))

        def interrupt(*arguments, **options):
            if next(calls) == (interrupted == "score_programs"):  # in the second batch
                raise KeyboardInterrupt
            return function(*arguments, **options)

        clock = PhaseClock(controlled, second)
        with monkeypatch.context() as patch:
            patch.setattr(control_programs, interrupted, interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                try_control_programs(controlled, second, None, clock)
            assert snapshot(second) != expected
        try_control_programs(controlled, second, None, clock)
        assert snapshot(second) == expected


def test_budget_of_tuned_controls_is_that_of_the_search(controlled, store, searched):
    problems = len(controlled.problems[DEVELOPMENT])
    assert control_settings(controlled, store).budget == spent(store).problems // problems
    few = dataclasses.replace(controlled.config.controls, max_evaluations=1)
    limited = dataclasses.replace(
        controlled, config=dataclasses.replace(controlled.config, controls=few)
    )
    assert control_settings(limited, store).budget == 1


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (["score=as_written"], 640),
        (["score=tuned"], 640 + 3 * (40 + 80 + 160 + 320 + 640)),
        (["score=tuned", "tuning={structures: {rungs: 2}}"], 640 + 3 * (40 + 80)),
        (["score=tuned", "race=null", "tuning={structures: {candidates: 0}}"], 2 * 640),
    ],
)
def test_most_that_a_program_may_cost(overrides, most):
    assert most_problems(read_config("demo", overrides), 640) == most


def test_switched_off_is_off(context, store):
    off = ControlsConfig(tuned=(), random=False, untrained=False)
    for controls_config in (None, off):
        config = dataclasses.replace(context.config, controls=controls_config)
        assert program_controls(config) == ()
        without = dataclasses.replace(context, config=config)
        run_controls(without, store, None, PhaseClock(without, store))
    assert store.select(Sample) == store.select(Entry) == ()


def test_run_without_training_is_the_untrained_control(context):
    training = dataclasses.replace(context.config.training, enabled=False)
    config = dataclasses.replace(context.config, training=training, controls=ControlsConfig())
    assert program_controls(config) == (RANDOM,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuned": ("weighs",)}, r"controls.tuned: no method or family 'weighs'; did you mean"),
        ({"tuned": ()}, r"controls.random: random programs merge 2 to 5 experts, and the run has"),
    ],
)
def test_controls_that_do_not_fit_are_refused(context, changes, message):
    experts = {"expert_1": context.config.experts["expert_1"]}
    config = dataclasses.replace(
        context.config, experts=experts, controls=ControlsConfig(**changes)
    )
    with pytest.raises(UserError, match=message):
        check_controls(dataclasses.replace(context, config=config))
