"""Small search on the zoo: its results, and interruptions."""

import dataclasses
import html
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.core.versions import current_versions
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.racing import Race, race
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import model_folder
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.io.peft import read_adapter
from sdjax.models.lora import merge_lora
from sdjax.models.tree import flatten
from sdjax.report.page import render
from sdjax.sandbox import sandbox
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.search import context, loop, multihost, refinement, resume, scoring, tune
from sdjax.search.comparison_config import BaselinesConfig, ControlsConfig, RunTuningConfig
from sdjax.search.config import ExpertConfig
from sdjax.search.context import build_context
from sdjax.search.loop import run_search
from sdjax.search.plan import plan_run
from sdjax.search.provenance import run_inputs
from sdjax.search.sampling import (
    SamplingOptions,
    generator_of_model,
    generator_of_run,
    sample_programs,
)
from sdjax.search.score_types import Answer, Comparison, StoredPair, TestOpening
from sdjax.search.scoring import racing_order
from sdjax.search.store import Store
from sdjax.search.types import (
    CONFIRMATION,
    DEVELOPMENT,
    TEST,
    Change,
    Checkpoint,
    Entry,
    Program,
    program_entry,
)
from sdjax.tuning import candidates
from sdjax.tuning.search import SearchConfig


def results(folder):
    """Return the results that must not depend on interruptions."""
    with Store.open(folder) as store:
        return {
            "samples": [(s.iteration, s.number, s.text, s.status) for s in store.judged()],
            "scores": {
                (summary.entry, summary.split): (summary.strict, summary.flexible)
                for summary in store.summaries(setting=None)
            },
            "answer": (store.select(Answer), store.select(Comparison), store.select(TestOpening)),
            "pairs": [store.select(StoredPair, iteration=iteration) for iteration in (1, 2)],
        }


def with_expert(config, model):
    """Return the config with another model in slot expert_1."""
    expert = dataclasses.replace(config.experts["expert_1"], model=str(model))
    return dataclasses.replace(config, experts={**config.experts, "expert_1": expert})


@pytest.fixture(scope="module")
def verified():
    """The IR of every verification in the run of `finished`, by the module that asked for it."""
    return {sandbox: [], context: []}


@pytest.fixture(scope="module")
def decoded():
    """The ids of the problems that are decoded in the run of `finished`, by the phase before."""
    return {"search": set(), "confirm": set(), "test": set()}


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory, verified, decoded):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        phase = "search"

        def record(decoder, tokenizer, params, task, problems, **options):
            decoded[phase] |= {item.problem.id for item in problems}
            return evaluate_problems(decoder, tokenizer, params, task, problems, **options)

        def entered(name, function):
            def enter(*arguments):
                nonlocal phase
                phase = name
                function(*arguments)

            return enter

        for module in (scoring, candidates):
            patch.setattr(module, "evaluate_problems", record)
        patch.setattr(loop, "confirm", entered("confirm", loop.confirm))
        patch.setattr(loop, "score_run_test", entered("test", loop.score_run_test))
        for module, calls in verified.items():

            def recorded(ir, signature, calls=calls):
                calls.append(ir)
                return verify_ir(ir, signature)

            patch.setattr(module, "verify_ir", recorded)
        run_search(small_config, folder)
    return folder


def test_search_reads_neither_confirmation_nor_test_problems(finished, small_config, decoded):
    problems = {
        split: {item.problem.id for item in items}
        for split, items in plan_run(small_config).problems.items()
    }
    assert decoded["search"] == problems[DEVELOPMENT]
    assert decoded["confirm"] == problems[CONFIRMATION]
    assert problems[TEST] <= decoded["test"] <= problems[TEST] | problems[CONFIRMATION]
    with Store.open(finished) as store:
        (opening,) = store.select(TestOpening)
        (answer,) = store.select(Answer)
        tested = {one.entry for one in store.summaries(TEST)}
        assert tested == {*opening.entries, *opening.earlier_bests}
        assert {one.entry for one in store.summaries(CONFIRMATION)} == tested
        assert answer.sentence in html.unescape(render(store))


def test_each_source_is_decoded_and_verified_once(finished, verified):
    with Store.open(finished) as store:
        sources = {sample.source for sample in store.judged() if sample.source}
        programs = {program.ir for program in store.by_key(Program).values()}
    assert programs <= set(verified[sandbox])
    assert len(verified[sandbox]) <= len(sources)
    assert not verified[context]


def test_every_phase_saves_its_results(finished, small_config):
    with Store.open(finished) as store:
        assert store.run().finished_at is not None
        samples = store.judged()
        assert len(samples) == small_config.iterations * small_config.generation.samples
        assert all(sample.status != "not judged" for sample in samples)
        novel = {f"program:{sample.identity}" for sample in samples if sample.novel}
        scored = {s.entry for s in store.summaries(DEVELOPMENT) if s.complete}
        assert novel
        assert novel <= scored
        assert {"seed", "expert:expert_1", "method:task_arithmetic(weight=0.2)"} <= scored
        assert [checkpoint.iteration for checkpoint in store.select(Checkpoint)] == [1]
        (opening,) = store.select(TestOpening)
        finalists = [name for name in opening.entries if name.startswith("program:")]
        assert len(finalists) == min(2, len(novel))


def test_every_generator_is_a_peft_adapter_folder(finished, small_config):
    context = build_context(small_config)
    with GeneratorCheckpoints(finished / "generators") as checkpoints:
        saved, _ = checkpoints.restore_adapter(1)
    folder = finished / "adapters" / "iteration-1"
    written = read_adapter(folder, context.model, model=Path("zoo:seed"))
    jax.tree.map(np.testing.assert_array_equal, written.factors, saved.factors)
    assert written.scale == saved.scale
    _, merged = load_model(f"zoo:seed+{folder}", dtype=np.float32)
    _, seed = load_model("zoo:seed", dtype=np.float32)
    expected = flatten(merge_lora(seed, saved))
    changed = [
        path
        for path, leaf in flatten(merged).items()
        if not np.array_equal(leaf, flatten(seed)[path])
    ]
    assert changed
    for path in changed:
        np.testing.assert_allclose(flatten(merged)[path], expected[path], atol=1e-2)


@pytest.mark.slow
def test_generator_is_trained_after_the_last_iteration_on_request(finished, small_config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    training = dataclasses.replace(small_config.training, after_last=True)
    run_search(dataclasses.replace(small_config, training=training), folder)
    with Store.open(folder) as store:
        assert [one.iteration for one in store.select(Checkpoint)] == [1, 2]
        assert [one.key for one in store.select(Change)] == ["training.after_last"]
    assert (folder / "adapters" / "iteration-2" / "adapter_model.safetensors").exists()
    assert results(folder) == results(finished)


def test_running_a_finished_run_again_writes_what_was_removed_and_changes_nothing(
    finished, small_config, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "adapters/iteration-1/adapter_model.safetensors"
    before = file.read_bytes()
    shutil.rmtree(file.parent)
    run_search(small_config, folder)
    assert file.read_bytes() == before
    assert results(folder) == results(finished)


def test_seed_and_expert_may_be_a_model_with_an_adapter(finished, small_config):
    adapter = finished / "adapters" / "iteration-1"
    name = f"zoo:seed+{adapter}"
    experts = small_config.experts | {"expert_1": ExpertConfig(model=name, description="trained")}
    context = build_context(dataclasses.replace(small_config, seed=name, experts=experts))
    seed = flatten(context.seed)
    for path, leaf in flatten(context.experts["main"][0]).items():
        np.testing.assert_array_equal(leaf, seed[path])


def test_training_membership_of_programs_is_known(finished):
    with Store.open(finished) as store:
        programs = store.by_key(Program).values()
        assert all(program.in_training is not None for program in programs)
        assert all(program.families is not None for program in programs)


@pytest.mark.slow
@pytest.mark.parametrize("program", [1, 4])
def test_interrupted_run_gives_the_same_result(
    finished, small_config, tmp_path, monkeypatch, program
):
    """Interrupt while a program is scored, after some of its problems."""
    scored = 0
    save_scores = Store.save_scores

    def interrupted(store, entry, split, outcomes, **options):
        nonlocal scored
        scored += entry.startswith("program:")
        if scored == program:
            outcomes = list(outcomes)
            save_scores(store, entry, split, outcomes[:10], complete=False)
            raise KeyboardInterrupt
        save_scores(store, entry, split, outcomes, **options)

    folder = tmp_path / "run"
    monkeypatch.setattr(Store, "save_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(small_config, folder)
    monkeypatch.undo()
    run_search(small_config, folder)
    assert results(folder) == results(finished)


@pytest.mark.slow
def test_race_and_tuning_resume(finished, small_config, tmp_path, monkeypatch):
    """Interrupt a run in its race and in a search; compare the race with its simulation."""
    rules = Race(first_rung=6, winners=3, z=0.5)  # the number of tested programs
    config = dataclasses.replace(
        small_config,
        iterations=1,
        race=Race(first_rung=6, winners=2, z=0.5),
        tuning=RunTuningConfig(programs=1, search=SearchConfig(budget=2, steps=2, batch=2)),
        controls=ControlsConfig(tuned=("slope",), random=False, untrained=False, max_evaluations=2),
        test=dataclasses.replace(small_config.test, top_k=3),
    )
    folder, score, calls = tmp_path / "run", scoring.score, itertools.count()

    def interrupted(*arguments, **options):
        score(*arguments, **options)
        if next(calls) == 6:  # in the second rung
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(config, folder)
    monkeypatch.undo()
    evaluate = tune.CandidateScorer.__call__

    def interrupted_again(*arguments, **options):
        if next(calls) == 10:  # in the search of the control, after that of the program
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    calls = itertools.count(8)
    monkeypatch.setattr(tune.CandidateScorer, "__call__", interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        run_search(config, folder)
    monkeypatch.undo()
    run_search(config, folder)
    with Store.open(finished) as store:
        names = [program_entry(s.identity) for s in store.judged(1) if s.novel]
        solved = {
            name: {o.problem_id: o.strict for o in store.outcomes(name, "development")}
            for name in names
        }
    order = [item.problem.id for item in racing_order(build_context(config).problems[DEVELOPMENT])]

    def answer(name, count):
        return [solved[name][id] for id in order[:count]]

    expected = race(names, answer, len(order), rules)
    with Store.open(folder) as store:
        for name in names:
            answered = {o.problem_id: o.strict for o in store.outcomes(name, "development")}
            assert answered == dict(zip(order, expected[name], strict=False))
            assert store.is_complete(name, "development") == (len(answered) == len(order))
        entries = store.by_key(Entry)
        tested = {s.entry for s in store.summaries("test")}
        best = sorted(names, key=lambda name: (-sum(expected[name]), name))
        complete = [name for name in best if len(expected[name]) == len(order)]
        written = entries[complete[0]]
        assert written.detail["tuning"]["problems"] == 2 * len(order)
        # Two steps may find no better numbers; then the program stays as it is.
        tuned = [entry for entry in entries.values() if "tuned_from" in entry.detail]
        assert [entry.detail["tuned_from"] for entry in tuned] == [written.identity] * len(tuned)
        assert len(tuned) <= 1
        control = entries["method:slope, tuned"]
        assert len(control.detail["values"]) == control.detail["constants"] == 6
        assert control.detail["problems"] == 2 * len(order)
        assert {control.name, written.name, *(entry.name for entry in tuned)} <= tested
        # The best three, and the best one in its other form.
        assert len([one for one in tested if one.startswith("program:")]) in (3, 4)
        for entry in (control, *tuned):
            assert store.is_complete(entry.name, "development")
        tunings = sorted(path.name for path in (folder / "tuning").iterdir())
        assert tunings == sorted([complete[0].removeprefix("program:")[:16], "slope-2"])
        before = results(folder)
    assert any(len(row) < len(order) for row in expected.values())
    run_search(config, folder)
    assert results(folder) == before


KILLED = """
import json, os, signal, sys
from pathlib import Path
from sdjax.search import loop, refinement
from sdjax.search.config import config_from
from sdjax.search.store import Store
from sdjax.search.types import Sample

def dies(function, call, kind=object):
    # Kill the process after this call of the function with a last argument of this kind.
    def counted(*arguments, **options):
        counted.calls += isinstance(arguments[-1], kind)
        result = function(*arguments, **options)
        if counted.calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    counted.calls = 0
    return counted

where = sys.argv[3]
if where == "generating":
    Store.save = dies(Store.save, 3, Sample)
if where == "refining":
    train = refinement.train_dpo
    refinement.train_dpo = lambda *arguments, **options: train(
        *arguments, on_step=dies(lambda *_: None, 1), **options)
if where == "checkpointing":  # its files are complete, but not recorded in the store
    saves = loop.GeneratorCheckpoints
    saves.save_adapter = dies(saves.save_adapter, 1)
loop.run_search(config_from(json.loads(sys.argv[1]), "test"), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["generating", "refining", "checkpointing"])
def test_killed_run_gives_the_same_result(finished, small_config, tmp_path, where):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, json.dumps(small_config.to_json()), folder, where]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    with Store.open(folder) as store:
        assert len(store.sample_numbers(1)) == (3 if where == "generating" else 8)
        assert bool(store.select(StoredPair, iteration=1)) == (where != "generating")
        assert store.select(Checkpoint) == ()
    run_search(small_config, folder)
    assert results(folder) == results(finished)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_ends_a_run_with_one_line(small_config, tmp_path, number):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small_config.to_json()))
    folder = tmp_path / "run"
    # Background jobs of a shell ignore Ctrl-C.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sdjax.__main__ import start; start()"
    )
    command = [sys.executable, "-c", code, "run", config, "--out", folder]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            assert line.startswith("sdjax: ")
            if line.startswith("sdjax: baselines: seed "):  # the iterations start
                break
        process.send_signal(number)
        output, error = process.communicate(timeout=600)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == f"sdjax: interrupted; resume with: sdjax run --resume {folder}"
    assert all(line.startswith("sdjax: ") for line in error.splitlines())
    assert output == ""
    assert results(folder)["scores"]["seed", DEVELOPMENT]


def test_change_of_an_earlier_result_is_refused(finished, small_config):
    before = results(finished)
    changed = dataclasses.replace(small_config, rng_seed=7)
    with pytest.raises(UserError, match=r"rng_seed = 0, which cannot become 7: all random numbers"):
        run_search(changed, finished)
    assert results(finished) == before


@pytest.mark.slow
def test_extended_run_equals_one_that_was_larger_from_the_start(finished, small_config, tmp_path):
    """Extend a finished run of one iteration by a second one, and by another baseline."""
    paper = {"task_arithmetic": {"weight": (0.2,)}}
    smaller = dataclasses.replace(
        small_config,
        iterations=1,
        baselines=BaselinesConfig(paper=paper),
        test=dataclasses.replace(small_config.test, top_k=1),
    )
    folder = tmp_path / "run"
    run_search(smaller, folder)
    with Store.open(folder) as store:
        assert store.run().finished_at is not None
        tested = {one.entry for one in store.summaries(TEST)}
    run_search(small_config, folder)
    extended, whole = results(folder), results(finished)
    for key in ("samples", "pairs"):
        assert extended[key] == whole[key]
    # The programs that were tested earlier keep their test scores.
    for (entry, split), score in extended["scores"].items():
        assert whole["scores"].get((entry, split), score) == score
        assert (entry, split) in whole["scores"] or (split == TEST and entry in tested)
    assert whole["scores"].keys() <= extended["scores"].keys()
    with Store.open(folder) as store:
        assert store.run().finished_at is not None
        assert store.run().config["iterations"] == 2
        changes = store.select(Change)
        assert [(one.kind, one.key, one.old, one.new) for one in changes] == [
            (
                "config",
                "baselines.paper.task_arithmetic",
                '{"weight": [0.2]}',
                '{"weight": [0.2, 0.6]}',
            ),
            ("config", "iterations", "1", "2"),
            ("config", "test.top_k", "1", "2"),
        ]
        assert all(one.changed_at for one in changes)
        assert "iterations" in render(store)


@pytest.mark.slow
def test_moved_model_is_the_same_and_another_one_is_not(finished, small_config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = results(folder)
    with pytest.raises(UserError, match=r"experts.expert_1.model = .*other weights"):
        run_search(with_expert(small_config, "zoo:judge"), folder, accept_versions=True)
    moved = shutil.copytree(model_folder("zoo:reader"), tmp_path / "moved")
    run_search(with_expert(small_config, moved), folder)
    assert results(folder) == before
    with Store.open(folder) as store:
        assert [one.key for one in store.select(Change)] == ["experts.expert_1.model"]


@pytest.mark.slow
def test_other_weights_and_versions_are_refused_unless_accepted(
    finished, small_config, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = results(folder)
    inputs = run_inputs(build_context(small_config))
    fingerprints = {**inputs, "expert_1": "0" * 16}
    monkeypatch.setattr(multihost, "run_inputs", lambda context: fingerprints)
    newer = current_versions() | {"jax": "9.9.9"}
    monkeypatch.setattr(resume, "current_versions", lambda: newer)
    message = rf"jax \S+ -> 9.9.9; expert_1 {inputs['expert_1']} -> 0{{16}}; .*--accept-versions"
    with pytest.raises(UserError, match=message) as caught:
        run_search(small_config, folder)
    assert "\n" not in str(caught.value)
    run_search(small_config, folder, accept_versions=True)
    assert results(folder) == before
    with Store.open(folder) as store:
        assert [(one.kind, one.key, one.new) for one in store.select(Change)] == [
            ("version", "jax", "9.9.9"),
            ("input", "expert_1", "0" * 16),
        ]
        assert "9.9.9" in render(store)
    run_search(small_config, folder)  # accepted once and for all


@pytest.mark.slow
def test_control_is_never_trained(small_config, tmp_path):
    training = dataclasses.replace(small_config.training, enabled=False)
    config = dataclasses.replace(small_config, training=training)
    run_search(config, tmp_path / "run")
    with Store.open(tmp_path / "run") as store:
        assert store.select(Checkpoint) == ()
        assert {sample.iteration for sample in store.judged()} == {1, 2}


@pytest.mark.slow
def test_without_pairs_the_generator_is_unchanged(small_config, tmp_path, monkeypatch):
    """Check that the run continues with the same generator."""
    monkeypatch.setattr(refinement, "make_pairs", lambda *args, **options: ())
    training = dataclasses.replace(small_config.training, after_last=True)
    config = dataclasses.replace(small_config, iterations=1, training=training)
    run_search(config, tmp_path / "run")
    with Store.open(tmp_path / "run") as store:
        assert store.select(Checkpoint)[0].detail == {"pairs": 0, "texts": 0}


SCORES = """
import dataclasses, json, sys
from pathlib import Path
from sdjax.search.config import config_from
from sdjax.search.loop import run_search
from sdjax.search.provenance import run_inputs
from sdjax.search.store import Store
config = config_from(json.loads(sys.argv[1]), "test")
folder = Path(sys.argv[2])
run_search(config, folder)
with Store.open(folder) as store:
    scores = {s.entry: s.strict for s in store.summaries("development")}
    print(json.dumps([scores, [s.text for s in store.judged(1)]]))
"""


def scores_on(devices: int, config, folder: Path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", SCORES, json.dumps(config.to_json()), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_match_the_scores_of_one_device(small_config, finished, tmp_path):
    mesh = dataclasses.replace(small_config.mesh, data=2, tensor=4)
    config = dataclasses.replace(small_config, iterations=1, mesh=mesh)
    scores, texts = scores_on(8, config, tmp_path / "eight")
    with Store.open(finished) as store:
        assert texts == [s.text for s in store.judged(1)]
        expected = {s.entry: s.strict for s in store.summaries("development")}
    assert len(scores) > 1
    assert scores == {entry: expected[entry] for entry in scores}


def sampled(folder, count, **options):
    samples = []
    generator = generator_of_run(folder, SamplingOptions(**options), count=count)
    sample_programs(generator, on_sample=samples.append)
    return [(sample.number, sample.text, sample.tokens, sample.stopped) for sample in samples]


def test_samples_of_an_iteration_are_drawn_again(finished):
    with Store.open(finished) as store:
        for iteration in (1, 2):
            stored = [(s.number, s.text, s.tokens, s.stopped) for s in store.judged(iteration)]
            assert sampled(finished, 8, iteration=iteration) == stored
            # Whatever the number of samples and of slots.
            assert sampled(finished, 3, iteration=iteration) == stored[:3]
        first = [(s.number, s.text, s.tokens, s.stopped) for s in store.judged(1)]
    assert sampled(finished, 8) != first  # of the newest generator


def test_model_with_adapter_and_the_settings_of_a_run_gives_its_samples(finished, small_config):
    generation = small_config.generation
    model = f"zoo:seed+{finished / 'adapters' / 'iteration-1'}"
    options = SamplingOptions(
        prompt="short",
        temperature=generation.temperature_at(2),
        iteration=2,
        max_new_tokens=generation.decoding.max_new_tokens,
        slots=8,
    )
    generators = (
        generator_of_model(model, options, slots=small_config.slots, count=8),
        generator_of_run(finished, options, count=8),
    )
    texts = []
    for generator in generators:
        sample_programs(generator, on_sample=lambda sample: texts.append(sample.text))
    assert texts[:8] == texts[8:]


def test_generator_of_a_missing_iteration_is_an_error(finished, tmp_path):
    with pytest.raises(
        UserError, match=r"iteration 4 has no generator yet: .*--set training.after_last"
    ):
        generator_of_run(finished, SamplingOptions(iteration=4), count=1)
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapters")
    with pytest.raises(UserError, match=r"iteration-1: not found; `sdjax run --resume"):
        generator_of_run(tmp_path / "run", SamplingOptions(), count=1)
