"""Co-evolution: promotions, bases, and what belongs to them."""

import contextlib
import dataclasses
import shutil

import numpy as np
import pytest

from sdjax.cli.merge_discovered import merge_discovered
from sdjax.core.recent import Recent
from sdjax.io.hf_checkpoint import load_model
from sdjax.models.fingerprint import fingerprint
from sdjax.report.page import render
from sdjax.search import loop
from sdjax.search.answer import count_numbers
from sdjax.search.base_chains import chain_of_entry
from sdjax.search.base_identity import base_of_iteration, generator_base, hash_on_base
from sdjax.search.baselines import score_baseline
from sdjax.search.bases import context_on_base
from sdjax.search.coevolution_config import CoevolutionConfig
from sdjax.search.comparison_config import ControlsConfig, RunTuningConfig
from sdjax.search.config import read_config
from sdjax.search.context import build_context
from sdjax.search.database import Database
from sdjax.search.iteration_scores import score_programs
from sdjax.search.loop import run_search
from sdjax.search.phases import judge
from sdjax.search.promotion import (
    GENERATOR_TEST,
    PRESENT_GENERATOR_TEST,
    describe_promotion,
    level_of_look,
    promote,
)
from sdjax.search.ranking import final_ranking
from sdjax.search.refinement import choose_training_data
from sdjax.search.score_types import Answer, Comparison, Promotion
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.types import (
    CONFIRMATION,
    DEVELOPMENT,
    PURPOSES,
    SEARCH,
    Entry,
    Lineage,
    Sample,
    program_entry,
)
from sdjax.tuning.search import SearchConfig

HEAD = "def merge_models(task_vectors):\n    a, b, c = task_vectors.values()\n"
# Each expert where it learned its specialty; see the README of the zoo.
GOOD = """import jax.numpy as jnp

def merge_models(task_vectors, depth, kind):
    a, b, c = task_vectors.values()
    a = jnp.where(depth < 1, 0.1, 1.0) * a
    b = (1.0 if kind == "mlp.down_proj" else 0.1) * b
    return a + b + jnp.where(2 * depth < 1, 0.7, 0.1) * c
"""
BAD = HEAD + "    return -0.5 * a\n"
HALF = HEAD + "    return 0.25 * a + 0.2 * b\n"


@pytest.fixture(scope="module")
def evolving(small_config):
    """Return the loaded search of these tests, which may change its base."""
    config = dataclasses.replace(
        small_config,
        task=dataclasses.replace(small_config.task, development=124, confirmation=100),
        # Some of the samples are not admissible.
        generation=dataclasses.replace(small_config.generation, temperature=1.0),
        coevolution=CoevolutionConfig(),
    )
    return build_context(config)


def with_options(context, **options):
    """Return a context of another run of co-evolution, without what the first one has cached."""
    coevolution = dataclasses.replace(context.config.coevolution, **options)
    config = dataclasses.replace(context.config, coevolution=coevolution)
    empty = {"last_base": {}, "verified": Recent(100)}
    return dataclasses.replace(context, config=config, **empty)


def new_store(context, folder):
    store = Store.create(folder, config=context.config.to_json(), versions={}, layers=[])
    save_settings(context, store)
    store.save(Entry(name="seed", kind="seed"))
    score_baseline(context, store, "seed", None, DEVELOPMENT)
    return store


def iterate(context, store, sandbox, sources, iteration, purpose=SEARCH):
    """Judge and score the programs of an iteration, which no model has written."""
    prompt = store.save_prompt("grammar", "")
    for number, source in enumerate(sources):
        key = {"prompt": prompt, "text": source, "tokens": (1,), "stopped": True}
        store.save(
            Sample(purpose=purpose, iteration=iteration, number=number, source=source, **key)
        )
    judge(context, store, sandbox, iteration=iteration, purpose=purpose)
    score_programs(context, store, sandbox, iteration=iteration, purpose=purpose)


@pytest.fixture(scope="module")
def evolved(evolving, sandbox, tmp_path_factory):
    """Return a store whose first iteration gave a base to the second one."""
    with new_store(evolving, tmp_path_factory.mktemp("evolved") / "run") as store:
        for number, sources in enumerate(([GOOD, BAD], [GOOD, HALF, BAD, BAD]), 1):
            iterate(evolving, store, sandbox, sources, number)
            promote(evolving, store, sandbox, iteration=number)
        yield store


def test_better_model_is_the_next_base(evolved, evolving):
    first, second = evolved.select(Promotion)
    good = evolved.judged(1)[0].identity
    assert (first.entry, first.base, first.is_base) == (program_entry(good), None, True)
    assert not first.is_generator
    assert first.low > 0
    assert first.problems == 100
    assert first.confidence == 1 - level_of_look(1) == 0.975
    assert second.base == first.entry
    bases = [base_of_iteration([first, second], SEARCH, n) for n in (1, 2, 3)]
    assert bases[:2] == [None, first.entry]
    assert bases[2] == (second.entry if second.is_base else first.entry)


def test_program_on_another_base_is_another_program(evolved):
    first, second = evolved.judged(1), evolved.judged(2)
    assert [one.status for one in second] == ["admitted"] * 3 + ["duplicate"]
    base = evolved.select(Promotion)[0].entry
    assert second[0].identity == hash_on_base(first[0].identity, base)
    again = evolved.program(second[0].identity)
    assert (again.base, again.source) == (base, GOOD)
    assert evolved.program(first[0].identity).base is None
    chain = chain_of_entry(evolved, evolved.by_key(Entry)[program_entry(again.identity)])
    assert [entry.name for entry in chain] == [base, program_entry(again.identity)]
    assert count_numbers(evolved, chain[1]) == 2 * count_numbers(evolved, chain[0]) == 12


def test_pairs_do_not_mix_bases(evolved, evolving):
    pairs = choose_training_data(evolving, evolved, iteration=2).pairs
    assert pairs
    assert {one.iteration for pair in pairs for one in (pair.chosen, pair.rejected)} == {2}


def test_merged_model_that_writes_fewer_programs_is_not_the_generator(evolved, evolving, sandbox):
    with Store.mirror(evolved.folder, evolved.content()) as store:

        def decide(tolerance):
            context = with_options(evolving, generator=True, samples=4, tolerance=tolerance)
            store.delete(Promotion, purpose=SEARCH)
            promote(context, store, sandbox, iteration=1, adapter=context.new_adapter())
            (decision,) = store.select(Promotion)
            return decision

        refused = decide(tolerance=0.05)
        # As many of the present generator: two of the iteration, and two more.
        more = [one.admissible for one in store.judged(purpose=PRESENT_GENERATOR_TEST)]
        assert len(more) == 2
        assert refused.admissible_before == (2 + sum(more)) / 4
        assert 0 < refused.admissible < refused.admissible_before - 0.05
        assert (refused.is_base, refused.is_generator) == (True, False)
        assert base_of_iteration([refused], SEARCH, 2) == refused.entry
        assert generator_base([refused], 2) is None
        share = f"{100 * refused.admissible:.1f} % of its samples are admissible, "
        share += f"before {100 * refused.admissible_before:.1f} %"
        assert "becomes the base: " in describe_promotion(refused)
        assert share in describe_promotion(refused)
        promoted = decide(tolerance=refused.admissible_before - refused.admissible)
        assert promoted == dataclasses.replace(refused, is_generator=True)
        assert generator_base([promoted], 2) == promoted.entry


def test_program_below_its_base_by_development_score_is_not_compared(evolving, sandbox, tmp_path):
    with new_store(evolving, tmp_path / "run") as store:
        iterate(evolving, store, sandbox, [BAD], 1)
        promote(evolving, store, sandbox, iteration=1)
        (decision,) = store.select(Promotion)
        assert decision == Promotion(purpose=SEARCH, iteration=1)
        assert "no new best program above the base" in describe_promotion(decision)
        assert not store.summaries(CONFIRMATION)
        iterate(evolving, store, sandbox, [GOOD], 2)
        promote(evolving, store, sandbox, iteration=2)
        assert store.select(Promotion)[1].confidence == 1 - level_of_look(1)


@pytest.mark.parametrize("option", ["recomputed", "kept"])
def test_base_is_computed_again_bit_by_bit(evolved, evolving, option):
    stored = evolved.select(Promotion)[0]
    context = with_options(evolving, task_vectors=option)
    on_base = context_on_base(context, evolved, stored.entry)
    assert fingerprint(on_base.seed) == stored.fingerprint
    again = context_on_base(with_options(evolving, task_vectors=option), evolved, stored.entry)
    assert again.seed is not on_base.seed
    assert fingerprint(again.seed) == stored.fingerprint
    assert context_on_base(on_base, evolved, stored.entry) is on_base
    assert context_on_base(on_base, evolved, None) is context
    before, after = (
        np.concatenate([np.ravel(np.float32(e[0]) - np.float32(b)) for b, e in pairs])
        for pairs in (c.mergers["main"].tensors.values() for c in (context, on_base))
    )
    assert np.allclose(before, after, rtol=0, atol=1e-6) == (option == "kept")


def check_merge_of_chain(context, store, out):
    """Check that `sdjax merge --run` writes the model that was scored in iteration 2."""
    name = program_entry(store.judged(2)[0].identity)
    expected = context_on_base(context, store, name).seed
    rank = [entry.name for entry in final_ranking(store, "strict")].index(name) + 1
    merge_discovered(store.folder, rank, out)
    assert fingerprint(load_model(out)[1]) == fingerprint(expected)
    assert "2 programs, applied one after another" in (out / "program.py").read_text()


def test_merge_of_a_run_gives_the_model_of_the_chain(evolved, evolving, tmp_path):
    check_merge_of_chain(evolving, evolved, tmp_path / "merged")


@pytest.mark.slow
def test_merge_of_a_run_with_kept_task_vectors(evolving, sandbox, tmp_path):
    context = with_options(evolving, task_vectors="kept")
    with new_store(context, tmp_path / "run") as store:
        iterate(context, store, sandbox, [GOOD], 1)
        promote(context, store, sandbox, iteration=1)
        iterate(context, store, sandbox, [HALF], 2)
        assert store.program(store.judged(2)[0].identity).base is not None
        check_merge_of_chain(context, store, tmp_path / "merged")


class Interrupted(BaseException):
    """Stands for a process that is killed."""


@contextlib.contextmanager
def killed_after(commits, monkeypatch):
    """Die within the write to a database that follows some others; later ones have no effect."""
    transaction = Database.transaction

    @contextlib.contextmanager
    def mortal(database):
        nonlocal commits
        if commits < 0:
            raise Interrupted
        with transaction(database) as connection:
            yield connection
            commits -= 1
            if commits < 0:
                raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Database, "transaction", mortal)
        yield


@pytest.mark.slow
def test_promotion_killed_within_a_write_again_and_again_is_the_same(
    evolving, sandbox, tmp_path, monkeypatch
):
    context = with_options(evolving, generator=True, samples=6, tolerance=1.0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with new_store(context, whole) as store:
        iterate(context, store, sandbox, [GOOD, BAD], 1)
    shutil.copytree(whole, killed)

    def decide(folder):
        own = with_options(context)
        with Store.open(folder, write=True) as store:
            promote(own, store, sandbox, iteration=1, adapter=own.new_adapter())

    decide(whole)
    deaths = 0
    while deaths < 50:
        # With fewer writes, none would get beyond the two around a merge.
        with killed_after(3, monkeypatch), contextlib.suppress(Interrupted):
            decide(killed)
            break
        deaths += 1
    assert deaths > 4
    assert content(killed) == content(whole)
    (decision,) = content(whole)["promotions"]
    assert "is_base=True, is_generator=True" in decision


def content(folder):
    with Store.open(folder) as store:
        return {
            "samples": [
                (s.purpose, s.iteration, s.number, s.text, s.identity, s.status)
                for purpose in (*PURPOSES, GENERATOR_TEST, PRESENT_GENERATOR_TEST)
                for s in store.judged(purpose=purpose)
            ],
            "scores": {
                (one.entry, one.setting, one.split): one.strict
                for one in store.summaries(setting=None)
            },
            "promotions": sorted(map(repr, store.select(Promotion))),
            "lineage": store.select(Lineage),
            "answer": (store.select(Answer), store.select(Comparison)),
        }


@pytest.mark.slow
def test_interrupted_run_ends_with_the_same_bases(small_config, tmp_path, monkeypatch):
    demo = read_config("demo")
    config = dataclasses.replace(
        small_config,
        task=dataclasses.replace(small_config.task, development=124, confirmation=100),
        tuning=RunTuningConfig(programs=1, search=SearchConfig(budget=2, steps=4)),
        controls=ControlsConfig(tuned=("weights",), random=True, untrained=False),
        coevolution=CoevolutionConfig(generator=True, samples=8, tolerance=1.0),
        transfer=demo.transfer,
        test=dataclasses.replace(small_config.test, top_k=1, ablations=1),
    )
    run_search(config, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    names = ("promote", "choose_training_data", "refine", "tune_controls_in_steps", "confirm")
    for name in names:
        with monkeypatch.context() as patch:
            function = getattr(loop, name)

            def interrupted(*arguments, function=function, **options):
                function(*arguments, **options)
                if options.get("iteration", 1) == 1:
                    raise Interrupted

            patch.setattr(loop, name, interrupted)
            with pytest.raises(Interrupted):
                run_search(config, tmp_path / "resumed")
    run_search(config, tmp_path / "resumed")
    assert content(tmp_path / "resumed") == expected
    search = [one for one in expected["promotions"] if "purpose='search'" in one]
    assert len(search) == 2
    with Store.open(tmp_path / "whole") as store:
        promoted = [one for one in store.select(Promotion, purpose=SEARCH) if one.is_base]
        assert promoted  # otherwise, other random numbers are needed for a test of promotions
        assert all(one.is_generator and one.admissible is not None for one in promoted)
        steps = [one for one in store.select(Entry, kind="method") if "step" in one.detail]
        assert steps
        later = [one for one in store.judged() if one.iteration > promoted[0].iteration]
        bases = {store.program(one.identity).base for one in later if one.admissible}
        assert promoted[0].entry in bases
        assert "next base and next generator" in render(store)
        assert store.select(Lineage)[0].base is None
        assert store.select(Lineage)[promoted[0].iteration].base == promoted[0].entry
