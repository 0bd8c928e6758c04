"""Stored verdicts on faults that only the model's weights reveal."""

import dataclasses
import re
import shutil

import jax
import pytest

from sdjax.core.errors import UserError
from sdjax.io.model_paths import TRAINING_PROGRAMS, model_folder
from sdjax.sandbox.compiler.probe import probe
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.search.apply_candidate import apply_program
from sdjax.search.attempts import attempt_seconds, pending_attempt
from sdjax.search.context import build_context
from sdjax.search.score_types import Application
from sdjax.search.scoring import score_program
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    MAIN,
    Attempt,
    Program,
    Sample,
    Setting,
    StoredVerdict,
    program_entry,
)

# Programs are probed at the first, the second and the last of the four layers; these misbehave only
# at the third.
PROGRAM = """
import jax
import jax.numpy as jnp

def merge_models(task_vectors, depth):
    x = task_vectors["expert_1"]
    between = (depth > 0.5) & (depth < 0.9)
    return {}
"""
NOT_FINITE = PROGRAM.format("jnp.where(between, jnp.inf, 1.0) * x")
ENDLESS = PROGRAM.format(
    "jax.lax.while_loop("
    "lambda c: c[0] < 1, lambda c: (jnp.where(between, 0, 1), 0.5 * c[1]), (0, x))[1]"
)
LOOP_AND_NAN = PROGRAM.format(
    "jax.lax.while_loop(lambda v: jnp.max(jnp.abs(v)) > 1e-3, lambda v: 0.5 * v, x)"
    " + jnp.where(between, jnp.nan, 0.0)"
)
FINE = PROGRAM.format("0.5 * x")


@pytest.fixture(scope="module")
def programs(context):
    """Return source -> program; all of them pass the probe."""
    programs = {}
    for source in (NOT_FINITE, ENDLESS, LOOP_AND_NAN, FINE):
        ir = trace_trusted(source, context.signature)
        program = verify_ir(ir, context.signature)
        probe(program, context.signature)
        programs[source] = Program(identity=program.identity, source=source, ir=ir)
    return programs


@pytest.mark.parametrize(
    ("source", "verdict", "rule"),
    [
        (NOT_FINITE, "non-finite", "weights"),
        (ENDLESS, "too costly", "loop-iterations"),
        (LOOP_AND_NAN, "non-finite", "weights"),
        (FINE, "admitted", ""),
    ],
)
def test_real_weights_may_change_the_verdict(context, programs, source, verdict, rule):
    application, merged = apply_program(context, programs[source], MAIN)
    assert (application.verdict, application.rule) == (verdict, rule)
    assert bool(application.message) == (merged is None) == (verdict != "admitted")


def test_compiler_error_is_a_verdict_and_other_exceptions_propagate(context, programs, monkeypatch):
    def raising(error):
        def merge(*arguments, **named):
            raise error

        return merge

    compiler = jax.errors.JaxRuntimeError("INTERNAL: no such layout")
    monkeypatch.setattr(type(context), "merge", raising(compiler))
    application, merged = apply_program(context, programs[FINE], MAIN)
    assert (application.verdict, application.rule, merged) == ("refused", "ir", None)
    monkeypatch.setattr(type(context), "merge", raising(AttributeError("ours")))
    with pytest.raises(AttributeError, match="ours"):
        apply_program(context, programs[FINE], MAIN)


def test_memory_limit_of_the_compiled_merge(context, programs, monkeypatch):
    program = dataclasses.replace(context.verified_program(programs[FINE]), max_memory=-1)
    monkeypatch.setitem(context.verified, program.identity, program)
    application, merged = apply_program(context, programs[FINE], MAIN)
    assert (application.verdict, application.rule) == ("too costly", "memory")
    assert merged is None


def test_memory_of_the_machine(context, programs, monkeypatch):
    program = context.verified_program(programs[FINE])
    for host, message in (
        (100, r"keeps [\d.e-]+ GB of arrays alive at once"),
        (program.memory // 4, r"the compiled merge needs [\d.e-]+ GB of memory at once"),
    ):
        monkeypatch.setattr("sdjax.sharding.memory.host_memory", lambda host=host: host)
        application, merged = apply_program(context, programs[FINE], MAIN)
        assert (application.verdict, application.rule, merged) == ("too costly", "memory", None)
        assert re.search(message + r".*, but the machine has", application.message)


def test_verdict_of_the_weights_is_stored(context, programs, sandbox, tmp_path):
    source = NOT_FINITE
    program = programs[source]
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        prompt = store.save_prompt("short", "def")
        for number in range(2):
            sample = Sample(
                iteration=1,
                number=number,
                prompt=prompt,
                text=source,
                tokens=(1,),
                stopped=True,
                source=source,
            )
            store.save(sample)
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        verdict = StoredVerdict(source=source, verdict="admitted", identity=program.identity)
        store.save(verdict, program)
        assert [one.status for one in store.judged()] == ["admitted", "duplicate"]
        score_program(context, store, sandbox, program.identity, DEVELOPMENT)
        assert [(one.status, one.rule) for one in store.judged()] == [("non-finite", "weights")] * 2
        assert store.summaries(DEVELOPMENT) == []
        (application,) = store.by_key(Application, setting=MAIN).values()
        assert "NaN or infinite" in application.message
        score_program(context, store, sandbox, program.identity, DEVELOPMENT)  # not applied again
        assert store.by_key(Application, setting=MAIN) == {application.entry: application}


@pytest.fixture
def store(context, programs, tmp_path):
    """Return a store with the program FINE."""
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        store.save(programs[FINE])
        yield store


@pytest.fixture
def apply_fine(context, programs, store, sandbox, monkeypatch):
    """Return a function that applies FINE as a run does, and returns what is stored."""
    monkeypatch.setattr("sdjax.search.scoring.score", lambda *arguments, **options: None)

    def apply() -> Application:
        score_program(context, store, sandbox, programs[FINE].identity, DEVELOPMENT)
        (application,) = store.select(Application)
        assert store.select(Attempt) == ()
        return application

    return apply


def _killed(store, programs, times):
    """Leave what a run leaves that was killed in a merge this many times."""
    entry = program_entry(programs[FINE].identity)
    store.save(Attempt(entry=entry, setting=MAIN, number=times))


def test_merge_is_repeated_after_the_first_death_and_refused_after_the_second(
    programs, store, apply_fine
):
    _killed(store, programs, 1)
    assert apply_fine().admitted
    _killed(store, programs, 2)
    application = apply_fine()
    assert (application.verdict, application.rule) == ("compiler", "interrupted")
    assert "crashed, hung or was killed while" in application.message


def test_attempt_is_in_the_store_during_the_merge_only(
    context, programs, store, sandbox, apply_fine, monkeypatch
):
    merge, seen = type(context).merge, []

    def observed(*arguments, **named):
        with Store.open(store.folder) as reader:
            seen.extend(reader.select(Attempt))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return merge(*arguments, **named)

    monkeypatch.setattr(type(context), "merge", observed)
    with pytest.raises(KeyboardInterrupt):
        apply_fine()
    assert store.select(Attempt) == ()  # the process lives
    assert apply_fine().admitted
    assert [attempt.number for attempt in seen] == [1, 1]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_merge_on_an_accelerator_is_watched_and_not_tried_in_a_child(
    store, sandbox, apply_fine, context, monkeypatch, platform
):
    merge, watched = type(context).merge, []

    def observed(*arguments, **named):
        watched.append((pending_attempt(store.folder), attempt_seconds(store.folder)))
        return merge(*arguments, **named)

    monkeypatch.setattr(type(context), "merge", observed)
    monkeypatch.setattr(sandbox, "try_merge", None)
    monkeypatch.setattr("jax.default_backend", lambda: platform)
    config = {"sandbox": {"apply_seconds": 7.0}}
    store.amend(config=config, versions={}, inputs=[])
    application = apply_fine()
    assert application.admitted
    assert set(watched) == {((application.entry, MAIN, 1), 7.0)}


def test_refusal_of_the_trial_is_stored(store, sandbox, apply_fine, monkeypatch):
    tried = []

    def refuse(ir, trial):
        tried.append(trial)
        return Refusal("compiler", "crash", "XLA crashed")

    monkeypatch.setattr(sandbox, "try_merge", refuse)
    application = apply_fine()
    assert (application.verdict, application.rule) == ("compiler", "crash")
    (trial,) = tried
    assert trial.compiler == "quick"
    assert {tensor.base for tensor in trial.tensors} == {"bfloat16"}
    assert any(tensor.changed for tensor in trial.tensors)


def test_corrupt_training_programs_raise_one_line_error(small_config, tmp_path):
    seed = tmp_path / "seed"
    shutil.copytree(model_folder(small_config.seed), seed)
    config = dataclasses.replace(small_config, seed=str(seed))
    file = seed / TRAINING_PROGRAMS
    whole = file.read_bytes()
    for broken in (b"", b"\x80\x04K\x01.", whole[:-7], whole[:60]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"training_programs\.npy: not a list") as error:
            build_context(config)
        assert "\n" not in str(error.value)
