"""Choice of training data in a store, and rounds of training by each rule."""

import dataclasses

import jax
import numpy as np
import pytest

from sdjax.search import refinement
from sdjax.search.iteration_scores import score_programs
from sdjax.search.phases import judge
from sdjax.search.refinement import choose_training_data, refine
from sdjax.search.score_types import StoredPair
from sdjax.search.scoring import save_settings
from sdjax.search.selection_config import SelectionConfig
from sdjax.search.store import Store
from sdjax.search.types import Sample

HEAD = "def merge_models(task_vectors):\n    a, b, c = task_vectors.values()\n    return "
GOOD, OTHER, SUM = (HEAD + body for body in ("0.5 * a", "0.3 * b", "0.4 * (a + b + c)"))
AGAIN = GOOD.replace("0.5 * a", "a * 0.5")  # the same program in another text
NOTHING = HEAD + "0.0 * a"
REFUSED = GOOD.replace("return", "import os\n    return")
FAULTS = SelectionConfig(
    refused=True,
    duplicates=True,
    unchanged=True,
    iterations="all",
    chosen_percent=50,
    rejected_percent=50,
    min_change=0.01,
)


def write(context, store, sandbox, iteration, texts, **values):
    """Save, judge and score samples."""
    prompt = store.save_prompt("short", context.prompt)
    for number, text in enumerate(texts):
        tokens = () if values else tuple(context.tokenizer.encode(text, add_special=False))
        key = {"prompt": prompt, "text": text, "tokens": tokens, "stopped": True}
        store.save(Sample(iteration=iteration, number=number, source=text, **key, **values))
    judge(context, store, sandbox, iteration=iteration)
    score_programs(context, store, sandbox, iteration=iteration)


@pytest.fixture(scope="module")
def store(context, sandbox, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refinement") / "run"
    config = context.config.to_json()
    with Store.create(folder, config=config, versions={}, layers=[]) as store:
        save_settings(context, store)
        write(context, store, sandbox, 1, [GOOD, OTHER, REFUSED, AGAIN, NOTHING])
        write(context, store, sandbox, 2, [GOOD, SUM], generator="hand")
        yield store


def with_rules(context, selection, **training):
    config = context.config
    training = dataclasses.replace(config.training, **training)
    config = dataclasses.replace(config, selection=selection, training=training)
    return dataclasses.replace(context, config=config)


@pytest.mark.slow
def test_faults_of_all_iterations_are_rejected(context, store):
    ruled = with_rules(context, FAULTS)
    first = choose_training_data(ruled, store, iteration=1)
    second = choose_training_data(ruled, store, iteration=2)
    assert choose_training_data(ruled, store, iteration=2) == second
    stored = [pair.rejected for pair in store.select(StoredPair, iteration=2)]
    assert stored == [pair.rejected for pair in second.pairs]
    for data, iterations in ((first, {1}), (second, {1, 2})):
        losers = {
            (p.rejected.text, p.rejected.iteration): p.rejected.fault
            for p in data.pairs
            if p.rejected.fault is not None
        }
        expected = {(REFUSED, 1): "refused", (AGAIN, 1): "duplicate", (NOTHING, 1): "unchanged"}
        chosen = {pair.chosen.text for pair in data.pairs}
        if 2 in iterations and GOOD not in chosen:  # a child that equals its parent
            expected[GOOD, 2] = "duplicate"
        if chosen == {GOOD}:  # a duplicate is not paired with its original
            del expected[AGAIN, 1]
        assert losers == expected


@pytest.mark.slow
def test_text_of_another_generator_is_tokenized(context, store):
    examples = refinement._examples(context, store)
    for number, text in enumerate([GOOD, SUM]):
        target = examples[2, number].target
        assert target[-1:] == context.tokenizer.eos_ids[:1]
        assert context.tokenizer.decode(target[:-1]).strip() == text.strip()


@pytest.mark.slow
def test_round_starts_from_the_current_or_the_first_generator(context, store):
    current = context.new_adapter()
    moved = jax.tree.map(lambda leaf: leaf + 0.01, current.factors)
    current = dataclasses.replace(current, factors=moved)

    def trained(**rules):
        ruled = with_rules(context, FAULTS, **rules)
        data = choose_training_data(ruled, store, iteration=2)
        return refine(ruled, store, current, data, iteration=2).factors

    again = trained(start="first")
    jax.tree.map(np.testing.assert_array_equal, trained(start="first"), again)
    first = context.new_adapter().factors

    def distance(one, other):
        return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), one, other)))

    assert 0 < distance(again, first) < 0.005 < distance(again, moved)
    assert 0 < distance(trained(start="current"), moved) < 0.005
    assert 0 < distance(trained(start="first", loss="forward_kl", beta=0.4), first) < 0.005


@pytest.mark.slow
def test_entropic_objective_trains_on_the_generators_own_samples(context, store, caplog):
    rules = {"objective": "entropic", "nll_weight": 0.0}
    ruled = with_rules(context, SelectionConfig(refused=True), **rules)
    data = choose_training_data(ruled, store, iteration=1)
    assert {one.sample.text for one in data.samples} == {GOOD, OTHER, REFUSED, AGAIN, NOTHING}
    assert data.summary()["refused"] == 1
    adapter = context.new_adapter()
    factors = refine(ruled, store, adapter, data, iteration=1).factors
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), factors, adapter.factors)
    assert any(jax.tree.leaves(changed))
    # the second iteration's were written by another generator
    others = choose_training_data(ruled, store, iteration=2)
    assert others.is_empty
    caplog.set_level("INFO")
    assert refine(ruled, store, adapter, others, iteration=2) is adapter
    assert "iteration 2: nothing to train on; the generator is unchanged" in caplog.text
