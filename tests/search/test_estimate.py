"""Announcement of a run, its dry run, and estimates of the time that is left."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from sdjax.cli.run import run
from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.search import phase_clock
from sdjax.search.announcement import announce, announce_resumption, check_new_folder, dry_run
from sdjax.search.comparison_config import ControlsConfig
from sdjax.search.config import ExpertConfig, read_config
from sdjax.search.estimate import describe_time_left, work_left
from sdjax.search.grids import grid_methods
from sdjax.search.loop import _baseline_summary
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.plan import plan_run
from sdjax.search.ranking import best_method
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    TEST,
    Checkpoint,
    Entry,
    Lineage,
    Program,
    Sample,
    Setting,
    StoredVerdict,
)

SMALL_TASK = ("--set", "task.development=8", "--set", "task.test=8")


@pytest.fixture(scope="module")
def plan(small_config):
    return plan_run(small_config)


@pytest.fixture
def store(tmp_path, plan):
    config = plan.config.to_json()
    with Store.create(tmp_path / "run", config=config, versions={}, layers=[]) as store:
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        yield store


def test_announcement_counts_the_work(plan):
    text = "\n".join(announce(plan))
    for part in (
        "run demo, on 1 cpu device",
        "seed zoo:seed; 3 experts: zoo:reader, zoo:calculator, zoo:judge",
        "16 programs (2 iterations of 8) and 6 baselines on 24 development problems of arithmetic",
        "test: the best 2 programs and at most 5 baselines on 6 confirmation problems and 24 test ",
    ):
        assert part in text
    assert "transfer" not in text


@pytest.mark.parametrize(
    ("iterations", "training", "reason"),
    [(1, True, "with one iteration"), (2, False, "without training"), (2, True, None)],
)
def test_control_that_adds_nothing_is_announced(plan, iterations, training, reason):
    config = dataclasses.replace(
        plan.config,
        iterations=iterations,
        training=dataclasses.replace(plan.config.training, enabled=training),
        controls=ControlsConfig(tuned=(), random=False, untrained=True),
    )
    lines = announce(dataclasses.replace(plan, config=config))
    told = [line for line in lines if line.startswith("controls.untrained adds nothing")]
    assert [f"adds nothing {reason}: " in line for line in told] == [True] * (reason is not None)


@pytest.mark.parametrize(
    ("iterations", "pairs_of", "noted"), [(3, "current", 1), (3, "all", 0), (2, "current", 0)]
)
def test_training_that_forgets_earlier_iterations_is_announced(plan, iterations, pairs_of, noted):
    """With two iterations there is one training, which forgets nothing."""
    config = dataclasses.replace(
        plan.config,
        iterations=iterations,
        training=dataclasses.replace(plan.config.training, start="first"),
        selection=dataclasses.replace(plan.config.selection, iterations=pairs_of),
    )
    lines = announce(dataclasses.replace(plan, config=config))
    told = [line for line in lines if line.startswith("training.start: first")]
    assert len(told) == noted


def test_summary_of_baselines_ignores_tuned_controls(plan, store):
    grid = grid_methods(plan.config)
    for name, kind in {"seed": "seed", **dict.fromkeys(grid, "method")}.items():
        store.save(Entry(name=name, kind=kind, detail=grid.get(name, {})))
        store.save_scores(name, DEVELOPMENT, _outcomes(2))
    control = "method:weights, tuned"
    store.save(Entry(name=control, kind="method", detail={"family": "weights"}))
    store.save_scores(control, DEVELOPMENT, _outcomes(4))
    assert best_method(store, "strict") == control
    assert _baseline_summary(SimpleNamespace(config=plan.config), store) == (
        f"baselines: seed 50.0%, best method {min(grid).removeprefix('method:')} 50.0%"
    )


def _outcomes(correct):
    return [
        Outcome(problem_id=f"p{n}", output="", strict=n < correct, flexible=n < correct)
        for n in range(4)
    ]


def test_dry_run_writes_nothing(tmp_path):
    folder = tmp_path / "new" / "run"
    options = ["demo", "--dry-run", *SMALL_TASK]
    result = CliRunner().invoke(run, [*options, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(f"run demo in {folder}, on ")
    assert "192 programs (4 iterations of 48) and 33 baselines on 4 " in lines[2]
    assert lines[3] == "prompts: short-memory, with at most 2 earlier programs, drawn by top"
    assert lines[4] == (
        "tuning: at most 3 programs, each with 12 evaluations on the development problems"
    )
    assert lines[5] == (
        "controls: weights, layers, tuned; each with at most as many evaluated problems as the "
        "programs of the search"
    )
    assert "baselines on 4 confirmation problems and 8 test problems, with the experts" in lines[6]
    assert lines[7].startswith("sandbox: ")
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(run, options).exit_code == 0  # no folder is needed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts.expert_1.model=zoo:none", "experts.expert_1.model: zoo:none: no such model"),
        ("sandbox.allow_missing=[x]", "sandbox.allow_missing: allow_missing: unknown layer 'x'"),
        ("training.rank=512", "training.rank: rank is 512, but no adapted projection has"),
        ("generation.decoding.buckets=[2]", "buckets: the prompt 'short-memory' has 4 tokens"),
    ],
)
def test_dry_run_reports_what_a_run_would(override, message):
    with pytest.raises(UserError) as caught:
        dry_run(read_config("demo", [override, *SMALL_TASK[1::2]]), None, resume=False)
    assert message in str(caught.value)


def test_dry_run_checks_the_weights(small_config, tmp_path):
    """Check that a damaged file of weights is found without loading the models."""
    from sdjax.io.model_paths import model_folder

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder("zoo:reader").iterdir():
        content = file.read_bytes()
        cut = content[: len(content) // 2] if file.suffix == ".safetensors" else content
        (broken / file.name).write_bytes(cut)
    experts = {**small_config.experts, "expert_1": ExpertConfig(model=str(broken))}
    with pytest.raises(UserError, match=r"experts\.expert_1\.model: .*broken"):
        dry_run(dataclasses.replace(small_config, experts=experts), None, resume=False)


def test_dry_run_of_a_resumption(store, plan):
    longer = dataclasses.replace(plan.config, iterations=4)
    score(store, "seed", "seed")
    with pytest.raises(UserError, match=r"not recorded: .*jax.*--accept-versions"):
        dry_run(longer, store.folder, resume=True)  # as the command itself
    lines = dry_run(longer, store.folder, resume=True, accept_versions=True)
    assert lines[-1].startswith("not checked: whether the weights")
    assert "resuming with 0 sampled programs and 1 scored model" in lines
    assert "change of iterations: 2 -> 4" in lines
    meshed = dataclasses.replace(
        plan.config, mesh=dataclasses.replace(plan.config.mesh, data=1, tensor=1)
    )
    with pytest.raises(UserError, match="mesh"):
        dry_run(meshed, store.folder, resume=True)
    with pytest.raises(UserError, match="rng_seed"):
        dry_run(dataclasses.replace(plan.config, rng_seed=8), store.folder, resume=True)
    assert store.run().config["iterations"] == 2


def test_new_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    check_new_folder(tmp_path / "none" / "none")
    with pytest.raises(UserError, match="not empty, and not a run"):
        check_new_folder(tmp_path)
    with pytest.raises(UserError, match="file is not a folder"):
        check_new_folder(tmp_path / "file" / "run")


def score(
    store, name: str, kind: str, identity: str | None = None, split: str = DEVELOPMENT
) -> None:
    from sdjax.evaluation.task import Outcome

    store.save(Entry(name=name, kind=kind, identity=identity))
    outcome = Outcome(problem_id="p", output="", strict=True, flexible=True)
    store.save_scores(name, split, [outcome])


def save_iteration(store, iteration: int, novel: int, refused: int) -> None:
    prompt = store.save_prompt("short", "def\n")
    store.save(Lineage(iteration=iteration, generator="zoo:seed", temperature=1.0))
    for number in range(novel + refused):
        source = f"{iteration} {number}"
        store.save(
            Sample(
                iteration=iteration,
                number=number,
                prompt=prompt,
                text=source,
                tokens=(1,),
                stopped=True,
                source=source,
            )
        )
        if number < novel:
            store.save(StoredVerdict(source=source, verdict="admitted", identity=source))
            store.save(Program(identity=source, source=source))
            score(store, f"program:{source}", "program", source)
        else:
            store.save(StoredVerdict(source=source, verdict="refused", rule="import"))
    store.save_phase(iteration, "generate", 1.0)
    store.save(Checkpoint(name=f"generator-{iteration}", iteration=iteration, path="x"))


def test_work_left_of_a_new_run(plan, store):
    assert vars(work_left(plan, store)) == {
        "baselines": 6,
        "generate": 16,
        "admit": 16,
        "score": 16.0,
        "refine": 1,
        "tune": 0,
        "controls": 0,
        "test": 7,
    }


def test_work_left_uses_the_share_of_novel_programs(plan, store):
    score(store, "seed", "seed")
    save_iteration(store, 1, novel=6, refused=2)
    assert vars(work_left(plan, store)) == {
        "baselines": 5,
        "generate": 8,
        "admit": 8,
        "score": 6.0,
        "refine": 0,
        "tune": 0,
        "controls": 0,
        "test": 7,
    }


def test_estimate_says_what_it_leaves_out(plan, store):
    assert describe_time_left(plan, store, {}) is None
    first = describe_time_left(plan, store, {"baselines": 2.0})
    # 6 baselines, 16 programs and 7 tests of as many problems
    assert first == (
        "about 58 s left for scoring; not measured yet, so not included: "
        "sampling, checking, the trial and compilation of programs, training"
    )
    rates = {"baselines": 2.0, "generate": 1.0, "admit": 0.5, "score": 3.0, "refine": 10.0}
    save_iteration(store, 1, novel=4, refused=4)
    left = 6 * 2 + 8 * 1 + 8 * 0.5 + 4 * 3 + 7 * 3
    assert describe_time_left(plan, store, rates) == f"about {left:.0f} s left"


def test_first_estimate_ignores_compilation(plan, store, monkeypatch, caplog):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phase_clock.time, "monotonic", lambda: clock.now)
    caplog.set_level(logging.INFO, logger="sdjax")
    phases = PhaseClock(plan, store)
    for seconds in (30.0, 20.0, 2.0, 2.0, 2.0):  # decoding and merging are compiled
        clock.now += seconds
        phases.baseline_scored()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("about 58 s left for scoring; not measured yet, so not included: ")


def test_tested_programs_that_are_no_longer_among_the_best_are_not_work_done(plan, store):
    save_iteration(store, 1, novel=3, refused=0)
    best = [f"program:1 {number}" for number in range(plan.config.test.top_k)]
    before = work_left(plan, store).test
    score(store, "program:1 2", "program", "1 2", split=TEST)
    assert work_left(plan, store).test == before
    score(store, best[0], "program", "1 0", split=TEST)
    assert work_left(plan, store).test == before - 1


def test_time_of_later_work_is_added_to_its_phase(plan, store, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phase_clock.time, "monotonic", lambda: clock.now)

    def scored(seconds: float, *names: str) -> float:
        with PhaseClock(plan, store).timed(0, "baselines"):
            clock.now += seconds
            for name in names:
                score(store, name, "method")
        return store.phases()[0, "baselines"]

    assert scored(4.0, "a") == 4
    assert scored(1.0) == 4  # a resumption of finished work
    assert scored(3.0, "b") == 7


def test_resumed_run_is_announced(store):
    assert announce_resumption(store) == []
    save_iteration(store, 1, novel=1, refused=0)
    assert announce_resumption(store) == ["resuming with 1 sampled program and 1 scored model"]
