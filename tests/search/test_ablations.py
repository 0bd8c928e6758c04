"""Ablations: each equals a program written by hand, and an interrupted phase resumes."""

import dataclasses
import re

import numpy as np
import pytest

from sdjax.evaluation.task import Outcome
from sdjax.io.hf_checkpoint import load_model
from sdjax.models.tree import flatten
from sdjax.search import ablations
from sdjax.search.ablations import ablate, ablations_of, is_settled, neutral_value
from sdjax.search.ranking import final_ranking
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import Attempt, Entry, Program, Setting, program_entry
from sdjax.tuning.types import Parameter

SOURCE = """
import jax.numpy as jnp


def merge_models(task_vectors, depth):
    a, b, c = task_vectors.values()
    return (0.7 * a + jnp.where(depth < 0.5, 0.9, 0.2) * b + 0.3 * c) / 1.5
"""
# w is 0.9 in the first half of the layers and 0.2 in the second one
BY_HAND = {
    "scaled by 0.5": lambda a, b, c, w: 0.5 * (0.7 * a + w * b + 0.3 * c) / 1.5,
    "c1 = 0 instead of 0.7": lambda a, b, c, w: (w * b + 0.3 * c) / 1.5,
    "c5 = 0 instead of 0.3": lambda a, b, c, w: (0.7 * a + w * b) / 1.5,
    "c6 = 1 instead of 1.5": lambda a, b, c, w: 0.7 * a + w * b + 0.3 * c,
    "without expert_2": lambda a, b, c, w: (0.7 * a + 0.3 * c) / 1.5,
    "expert_1 and expert_3 swapped": lambda a, b, c, w: (0.7 * c + w * b + 0.3 * a) / 1.5,
    "all tensors merged": lambda a, b, c, w: (0.7 * a + w * b + 0.3 * c) / 1.5,
}


@pytest.fixture(scope="module")
def confirmed(context):
    """Return a loaded run with confirmation problems and ablations."""
    problems = {**context.problems, "confirmation": context.problems["development"][:1]}
    test = dataclasses.replace(context.config.test, ablations=None)
    config = dataclasses.replace(context.config, test=test)
    return dataclasses.replace(context, config=config, problems=problems)


@pytest.fixture(scope="module")
def verdict(sandbox):
    return sandbox.judge(SOURCE)


@pytest.fixture
def store(verdict, tmp_path):
    """Return a store with the program SOURCE, scored on development and confirmation problems."""
    program = Program(identity=verdict.identity, source=SOURCE, ir=verdict.ir)
    name = program_entry(program.identity)
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        store.save(program, Entry(name=name, kind="program", identity=program.identity))
        for split in ("development", "confirmation"):
            store.save_scores(name, split, [outcome(split, correct=True)])
        yield store


def outcome(problem, *, correct):
    return Outcome(problem_id=problem, output="", strict=correct, flexible=correct)


@pytest.fixture
def scored(monkeypatch):
    """Merged weights of the ablations by title, which are not decoded; 25 evaluations suffice."""
    merged = {}

    def record(context, store, name, params, split):
        assert split == "confirmation"
        if len(merged) == record.interrupt_after:
            raise KeyboardInterrupt
        merged[name.split(":")[2]] = flatten(params)
        store.save_scores(name, split, [outcome(split, correct=False)])

    record.interrupt_after = None
    monkeypatch.setattr(ablations, "score", record)
    return merged, record


def test_ablations_equal_programs_written_by_hand(confirmed, store, sandbox, scored):
    merged, record = scored
    record.interrupt_after = 8
    with pytest.raises(KeyboardInterrupt):
        ablate(confirmed, store, sandbox)
    record.interrupt_after = None
    before = dict(merged)
    ablate(confirmed, store, sandbox)  # computes what is missing
    assert all(merged[title] is tensors for title, tensors in before.items())
    (program,) = store.select(Entry, kind="program")
    entries = ablations_of(store, program.name)
    assert [entry.name.split(":")[2] for entry in entries] == list(merged)
    assert all(is_settled(store, entry.name) for entry in entries)
    assert len(merged) == 4 + 6 + 3 + 3 + 1
    assert store.select(Attempt) == ()
    assert final_ranking(store, "strict") == [program]
    ablate(confirmed, store, sandbox)  # nothing is left
    assert len(merged) == len(entries)

    seed = flatten(confirmed.seed)
    slots = confirmed.config.slots
    experts = [flatten(load_model(confirmed.config.experts[s].model)[1]) for s in slots]
    layers = confirmed.model.num_layers
    for title, expression in BY_HAND.items():
        for path, found in merged[title].items():
            base = np.asarray(seed[path], np.float32)
            vectors = [np.asarray(expert[path], np.float32) - base for expert in experts]
            layer = re.search(r"layers/(\d+)/", path)
            is_late = layer is not None and int(layer[1]) / (layers - 1) >= 0.5
            expected = base + expression(*vectors, 0.2 if is_late else 0.9)
            if path not in confirmed.paths and title != "all tensors merged":
                expected = base
            # Weights are rounded to bfloat16, and so is a merged model before it is scaled.
            atol = 2e-3 if title.startswith("scaled") else 1e-6
            found = np.asarray(found, np.float32)
            np.testing.assert_allclose(found, expected, 2**-8, atol, err_msg=f"{title} {path}")


def test_merge_that_fails_is_recorded_and_not_tried_again(
    confirmed, store, sandbox, scored, monkeypatch
):
    def refuse(self, ablation):
        raise ablations.MergeFailure("no such tensor")

    monkeypatch.setattr(ablations.AblationMerges, "merge", refuse)
    ablate(confirmed, store, sandbox)
    monkeypatch.undo()
    ablate(confirmed, store, sandbox)
    results = store.select(Application)
    assert {(one.verdict, one.message) for one in results} == {("refused", "no such tensor")}
    assert len(results) == 17


def test_run_without_confirmation_problems_has_no_ablations(context, store, sandbox):
    ablate(context, store, sandbox)
    assert store.select(Entry, kind="ablation") == ()


@pytest.mark.parametrize(
    ("start", "low", "high", "value"),
    [(0.7, -1, 2, 0), (0.5, 0, 1, 0), (1.5, 0.4, 6, 1), (-2.0, -8, -0.5, -1)],
)
def test_neutral_value(start, low, high, value):
    assert neutral_value(Parameter(name="c", start=start, low=low, high=high)) == value
