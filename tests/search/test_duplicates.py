"""Comparison of merges with those of earlier programs that have equal results on the probe."""

import pytest

from sdjax.sandbox.compiler.probe import probe
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.search.duplicates import compare_with_earlier
from sdjax.search.iteration_scores import score_programs
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import Entry, Program, Sample, Setting, StoredVerdict, program_entry

# Of the tensors in scope, those with more rows than columns are not probed.
SOURCE = """
import jax.numpy as jnp

def merge_models(task_vectors, depth):
    a, b, c = task_vectors.values()
    is_tall = a.shape[0] > a.shape[1]
    return {}
"""
EXPRESSIONS = {
    "original": "(1 - depth) * a + depth * b",
    "rewritten": "a + depth * (b - a)",
    "larger": "(2 if is_tall else 1) * ((1 - depth) * a + depth * b)",
    "negated": "(-1 if is_tall else 1) * ((1 - depth) * a + depth * b)",
    "rewritten negation": "a + depth * (b - a) if not is_tall else depth * (a - b) - a",
}


@pytest.fixture(scope="module")
def programs(context):
    programs = {}
    for name, expression in EXPRESSIONS.items():
        source = SOURCE.format(expression)
        verified = verify_ir(ir := trace_trusted(source, context.signature), context.signature)
        programs[name] = Program(
            identity=verified.identity,
            source=source,
            ir=ir,
            fingerprint=probe(verified, context.signature).fingerprint,
        )
    return programs


@pytest.fixture
def store(context, programs, tmp_path):
    """Return a store in which each program is a sample of the first iteration, and the last one."""
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        prompt = store.save_prompt("short", "def")
        for program in programs.values():
            store.save(
                program,
                StoredVerdict(source=program.source, verdict="admitted", identity=program.identity),
            )
        for number, name in enumerate([*programs, "rewritten"]):
            sample = Sample(
                iteration=1,
                number=number,
                prompt=prompt,
                text="",
                tokens=(1,),
                stopped=True,
                source=programs[name].source,
            )
            store.save(sample)
        yield store


def test_programs_are_duplicates_if_their_merges_are_equal(
    context, programs, store, sandbox, monkeypatch
):
    assert len({program.identity for program in programs.values()}) == 5
    assert len({program.fingerprint for program in programs.values()}) == 1
    names = {program.identity: name for name, program in programs.items()}
    # Until the merges are compared, equal results on the probe tensors count.
    assert [sample.status for sample in store.judged()] == ["admitted"] + ["duplicate"] * 5
    unconfirmed = [names.get(sample.unconfirmed) for sample in store.judged()]
    assert unconfirmed == [None, "rewritten", "larger", "negated", "rewritten negation", None]

    scored = []
    monkeypatch.setattr(
        "sdjax.search.scoring.score",
        lambda context, store, entry, *rest, **limit: scored.append(entry),
    )
    score_programs(context, store, sandbox, iteration=1)
    assert scored == [
        program_entry(programs[name].identity) for name in ("original", "larger", "negated")
    ]
    judged = store.judged()
    assert [(names[sample.identity], sample.novel) for sample in judged] == [
        ("original", True),
        ("original", False),
        ("larger", True),
        ("negated", True),
        ("negated", False),
        ("original", False),
    ]
    assert {sample.unconfirmed for sample in judged} == {None}
    applications = store.by_key(Application)
    rewritten = applications[program_entry(programs["rewritten"].identity)]
    assert (rewritten.verdict, rewritten.rule) == ("duplicate", "weights")
    assert rewritten.original == programs["original"].identity
    assert rewritten.message == f"the same merge as {program_entry(rewritten.original)}"

    del scored[:]
    score_programs(context, store, sandbox, iteration=1)  # as in a resumed run
    assert store.by_key(Application) == applications
    assert len(scored) == 3  # `score` has saved nothing


def test_programs_whose_merges_cannot_be_compared_are_distinct(
    context, programs, store, sandbox, monkeypatch
):
    original, rewritten = programs["original"], programs["rewritten"]
    applied = Application(entry=program_entry(original.identity), change=0.5)
    store.save(Entry(name=applied.entry, kind="program", identity=original.identity), applied)
    tried = []

    def refuse(ir, trial):
        tried.append((ir, trial.subtracted))
        return Refusal("compiler", "crash", "XLA crashed")

    monkeypatch.setattr(sandbox, "try_merge", refuse)
    result = Application(entry=program_entry(rewritten.identity), change=0.5)
    assert compare_with_earlier(context, store, sandbox, rewritten, result) == result
    assert tried == [(rewritten.ir, original.ir)]
