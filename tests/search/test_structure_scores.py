"""Scores of structures: candidates, the race, resumption, and what samples get."""

import dataclasses

import pytest

from sdjax.evaluation.racing import Race
from sdjax.search import structure_search
from sdjax.search.budget import spent
from sdjax.search.comparison_config import RunTuningConfig, StructuresConfig
from sdjax.search.iteration_scores import score_programs
from sdjax.search.phases import judge
from sdjax.search.refinement import scored_samples
from sdjax.search.score_types import Application, Candidate, CandidateOutcome, ScoredStructure
from sdjax.search.scoring import racing_order, save_settings, score_program
from sdjax.search.store import Store
from sdjax.search.structures import program_scores
from sdjax.search.tune import NOT_TUNED, TUNING_FOLDER
from sdjax.search.types import TEST, Attempt, Entry, Sample, StoredVerdict, program_entry
from sdjax.tuning.search import SearchConfig

HEAD = "import jax.numpy as jnp\ndef merge_models(task_vectors):\n"
NAMES = "    a, b, c = task_vectors.values()\n"
SOURCES = {
    "sum": HEAD + NAMES + "    return 1.1 * a + 1.1 * b + 1.1 * c\n",
    "same sum": HEAD + NAMES + "    return 0.4 * a + 0.5 * b + 0.3 * c\n",
    "one": HEAD + NAMES + "    return 0.6 * a\n",
    "plain": HEAD + NAMES + "    return jnp.maximum(jnp.maximum(a, b), c)\n",
    "same plain": HEAD + NAMES + "    return jnp.maximum(a, jnp.maximum(b, c))\n",
    "infinite": HEAD + NAMES + "    return 3e38 * a + 3e38 * b\n",
}
RACE = Race(first_rung=6, winners=1, z=0.5)
RUNGS = RACE.rungs(24)


@pytest.fixture(scope="module")
def tuned(context):
    """Return the search of these tests with structures that are scored without a gradient."""
    structures = StructuresConfig(steps=0, candidates=2)
    config = dataclasses.replace(
        context.config,
        score="tuned",
        race=RACE,
        tuning=RunTuningConfig(structures=structures, search=SearchConfig(budget=1)),
        test=dataclasses.replace(context.config.test, top_k=1),
    )
    return dataclasses.replace(context, config=config)


def sampled(context, sandbox, folder, sources=SOURCES, iteration=1):
    """Return a store with judged samples of these sources."""
    config = context.config.to_json()
    store = Store.create(folder, config=config, versions={}, layers=[])
    save_settings(context, store)
    add(context, store, sandbox, sources, iteration)
    return store


def add(context, store, sandbox, sources, iteration):
    prompt = store.save_prompt("grammar", "")
    for number, source in enumerate(sources.values()):
        key = {"prompt": prompt, "text": source, "tokens": (), "stopped": True}
        store.save(Sample(iteration=iteration, number=number, source=source, **key))
    judge(context, store, sandbox, iteration=iteration)


def content(store):
    """Return all results; seconds are measured."""
    tables = (Candidate, CandidateOutcome, ScoredStructure, Entry)
    records = [sorted(map(repr, store.select(table))) for table in tables]
    applications = [dataclasses.replace(a, seconds=0.0) for a in store.select(Application)]
    return [*records, sorted(map(repr, applications)), store.summaries("development")]


@pytest.fixture(scope="module")
def scored(tuned, sandbox, tmp_path_factory):
    """Return a store with the scores of all sources, and the number of compiled merges."""
    with sampled(tuned, sandbox, tmp_path_factory.mktemp("scored") / "run") as store:
        cache = tuned.mergers["main"].compile_cache
        before = cache.compiled
        score_programs(tuned, store, sandbox, iteration=1)
        yield store, cache.compiled - before


def structure_of(store, name):
    return store.by_key(StoredVerdict)[SOURCES[name]].structure


def test_score_of_a_program_is_what_its_structure_reaches(scored, tuned):
    store, _ = scored
    samples = dict(zip(SOURCES, store.judged(1), strict=True))
    assert {name: sample.status for name, sample in samples.items()} == {
        "sum": "admitted",
        "same sum": "duplicate",
        "one": "admitted",
        "plain": "admitted",
        "same plain": "duplicate",
        "infinite": "non-finite",
    }
    structures = store.by_key(ScoredStructure)
    best = structures[structure_of(store, "sum")]
    assert best.written == samples["sum"].identity == samples["same sum"].identity
    assert best.best != best.written  # 0.1 is far from the best numbers
    entry = store.by_key(Entry)[program_entry(best.best)]
    assert entry.detail == {"tuned_from": best.written, "constants": 3}
    plain = structures[structure_of(store, "plain")]
    assert plain.best == plain.written
    assert store.by_key(Entry)[program_entry(plain.written)].detail == {}
    scores = {s.number: s for s in scored_samples(tuned, store, 1)}
    first, second = scores[0], scores[1]
    assert (first.identity, first.score) == (second.identity, second.score)
    assert first.identity == best.best
    assert first.score == program_scores(store, "strict")[best.written]
    written = {one.entry: one.strict for one in store.summaries("development")}
    assert first.score > written[program_entry(best.written)]
    assert first.change == store.by_key(Application)[program_entry(best.best)].change


def test_tuned_program_has_the_outcomes_of_its_candidate(scored, tuned, sandbox):
    store, _ = scored
    for one in store.select(ScoredStructure):
        for identity, number in ((one.written, 0), (one.best, None)):
            outcomes = store.outcomes(program_entry(identity), "development")
            answers = {}
            for other in store.select(CandidateOutcome, structure=one.structure):
                answers.setdefault(other.number, []).append(other.outcome)
            if answers:
                same = [n for n, found in answers.items() if tuple(found) == outcomes]
                assert same if number is None else number in same
    best = store.by_key(ScoredStructure)[structure_of(store, "sum")].best
    score_program(tuned, store, sandbox, best, TEST)  # merges with its own text
    assert store.is_complete(program_entry(best), TEST)


def test_structures_compile_once_whatever_the_numbers(scored, tuned):
    store, compiled = scored
    shapes = {experts[0].shape for _, experts in tuned.mergers["main"].tensors.values()}
    candidates = store.select(Candidate)
    assert len(candidates) > 3 * len({one.structure for one in candidates})
    searched = len({one.structure for one in candidates})
    # The first merge has no buffers to reuse. The other programs are merged as they are, and those
    # without numbers are compared with each other.
    assert compiled == (searched + 1 + 3 + 1) * len(shapes)


def test_structure_stops_only_if_it_is_clearly_worse(scored, tuned):
    store, _ = scored
    order = [item.problem.id for item in racing_order(tuned.problems["development"])]
    solved, counts = {}, {}
    for one in store.select(ScoredStructure):
        outcomes = store.outcomes(program_entry(one.best), "development")
        solved[one.structure] = {o.problem_id: o.strict for o in outcomes}
        counts[one.structure] = len(outcomes)
    stopped = {name for name, count in counts.items() if count < len(order)}
    assert stopped < set(counts)
    for name in stopped:
        rung = counts[name]
        running = [other for other, count in counts.items() if count >= rung]
        rows = {other: [solved[other][i] for i in order[:rung]] for other in running}
        # What it had reached, against what the others have reached with more numbers.
        assert name not in RACE.survivors(rows)


def test_budget_counts_every_candidate(scored):
    store, _ = scored
    answered = len(store.select(CandidateOutcome))
    plain = store.by_key(ScoredStructure)[structure_of(store, "plain")]
    own = len(store.outcomes(program_entry(plain.written), "development"))
    assert spent(store).problems == answered + own


@pytest.mark.slow
def test_interrupted_scores_are_those_of_an_uninterrupted_run(
    scored, tuned, sandbox, tmp_path, monkeypatch
):
    evaluate, calls = structure_search.evaluate_problems, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) in (2, 5, 9):
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(structure_search, "evaluate_problems", interrupted)
    with sampled(tuned, sandbox, tmp_path / "run") as store:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                score_programs(tuned, store, sandbox, iteration=1)
        score_programs(tuned, store, sandbox, iteration=1)
        assert content(store)[:3] == content(scored[0])[:3]
        before = len(calls)
        score_programs(tuned, store, sandbox, iteration=1)
        assert len(calls) == before


def test_structure_of_an_earlier_iteration_is_not_searched_again(scored, tuned, sandbox):
    store, _ = scored
    candidates = store.select(Candidate)
    text = SOURCES["sum"].replace("0.1", "0.7")
    add(tuned, store, sandbox, {"other numbers": text}, iteration=2)
    score_programs(tuned, store, sandbox, iteration=2)
    assert store.select(Candidate) == candidates
    (sample,) = scored_samples(tuned, store, 2)
    assert sample.identity == store.by_key(ScoredStructure)[structure_of(store, "sum")].best
    assert [one.status for one in store.judged(2)] == ["duplicate"]


def test_program_that_killed_the_run_twice_takes_part_as_written(tuned, sandbox, tmp_path):
    with sampled(tuned, sandbox, tmp_path / "run", {"one": SOURCES["one"]}) as store:
        identity = store.judged(1)[0].identity
        name = program_entry(identity)
        store.save(Entry(name=name, kind="program", identity=identity))
        store.save(Attempt(entry=name, setting=TUNING_FOLDER, number=2))
        score_programs(tuned, store, sandbox, iteration=1)
        assert store.select(Candidate) == store.select(Attempt) == ()
        assert NOT_TUNED in store.by_key(Entry)[name].detail
        (one,) = store.select(ScoredStructure)
        assert one.best == one.written == identity
        assert store.is_complete(name, "development")


def test_optimizer_cmaes_does_not_try_the_gradient_of_structures(
    tuned, sandbox, tmp_path, monkeypatch
):
    tuning = RunTuningConfig(
        structures=StructuresConfig(steps=3, batch=2, candidates=1),
        search=SearchConfig(budget=1, optimizer="cmaes"),
    )
    context = dataclasses.replace(tuned, config=dataclasses.replace(tuned.config, tuning=tuning))
    tried, try_merge = [], sandbox.try_merge

    def recorded(ir, trial):
        tried.append(trial.computes)
        return try_merge(ir, trial)

    monkeypatch.setattr(sandbox, "try_merge", recorded)
    with sampled(context, sandbox, tmp_path / "run", {"one": SOURCES["one"]}) as store:
        score_programs(context, store, sandbox, iteration=1)
        assert "gradient" not in tried
        assert len(tried) > 0
        origins = [one.origin for one in store.select(Candidate)]
    assert set(origins) == {"written", "sampled"}


@pytest.mark.slow
@pytest.mark.parametrize("rungs", [None, 1])
def test_gradient_moves_the_numbers_before_each_rung(tuned, sandbox, tmp_path, rungs):
    structures = StructuresConfig(steps=3, batch=2, rungs=rungs)
    tuning = dataclasses.replace(tuned.config.tuning, structures=structures)
    config = dataclasses.replace(tuned.config, tuning=tuning)
    context = dataclasses.replace(tuned, config=config)
    sources = {name: SOURCES[name] for name in ("sum", "one")}
    with sampled(context, sandbox, tmp_path / "run", sources) as store:
        score_programs(context, store, sandbox, iteration=1)
        for structure in {one.structure for one in store.select(Candidate)}:
            candidates = store.select(Candidate, structure=structure)
            assert [one.origin for one in candidates[:2]] == ["written", "gradient"]
            assert {one.origin for one in candidates[1:]} == {"gradient"}
            assert [one.rung for one in candidates[1:]] == list(range(len(candidates) - 1))
            assert [one.steps for one in candidates] == [0] + [3] * (len(candidates) - 1)
            assert rungs is None or len(candidates) == 1 + rungs
