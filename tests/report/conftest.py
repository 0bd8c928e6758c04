"""Fixture `made_up`: a small synthetic run in any state."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdjax.evaluation.task import Outcome
from sdjax.search.pairs import make_pairs
from sdjax.search.score_types import Application, ScoredSample, StoredPair
from sdjax.search.selection_config import SelectionConfig
from sdjax.search.store import Store
from sdjax.search.types import (
    Checkpoint,
    Entry,
    Lineage,
    Program,
    Sample,
    Setting,
    StoredVerdict,
    program_entry,
)

HOSTILE = (
    '</pre><script>alert("x")</script><img src=x onerror=alert(1)> {{ 7*7 }} \u202eevil\x1b[31m'
)
DEVELOPMENT_PROBLEMS, TEST_PROBLEMS = 200, 400


def new_store(folder: Path, iterations: int = 3) -> Store:
    config = {
        "name": f"run <b>{HOSTILE}</b>",
        "iterations": iterations,
        "task": {"name": "sums", "metric": "strict"},
        "test": {"top_k": 5},
    }
    versions = {"jax": "0.10.2", "sdjax": "0.1.0"}
    store = Store.create(folder, config=config, versions=versions, layers=["rlimits", "seccomp"])
    slots = {"expert_1": "zoo:a", "expert_2": "zoo:b"}
    for name in ("main", "transfer"):
        store.save_setting(
            Setting(name=name, seed="zoo:seed", slots=slots, scope="mlp", task="sums")
        )
    return store


def outcomes(rng: random.Random, skill: float, count: int) -> list[Outcome]:
    """Return outcomes whose difficulty depends on the problem, so that pairing matters."""
    difficulty = random.Random(count)
    results = []
    for number in range(count):
        flexible = rng.random() < skill + (difficulty.random() - 0.5)
        strict = flexible and rng.random() < 0.93
        results.append(
            Outcome(problem_id=f"p{number}", output="= 4", strict=strict, flexible=flexible)
        )
    return results


def add_baselines(store: Store, rng: random.Random) -> None:
    entries = [
        (Entry(name="seed", kind="seed"), 0.45),
        (Entry(name="expert_1", kind="expert"), 0.41),
        (Entry(name="expert_2", kind="expert"), 0.5),
    ]
    for scale, grids in ((0.2, ["paper", "fine"]), (0.4, ["paper", "fine"]), (0.7, ["fine"])):
        name = f"method:task_arithmetic(scale={scale})"
        detail = {"method": "task_arithmetic", "hyperparameters": {"scale": scale}, "grids": grids}
        entries.append((Entry(name=name, kind="method", detail=detail), 0.45 + scale / 6))
    for entry, skill in entries:
        store.save(entry)
        store.save_scores(entry.name, "development", outcomes(rng, skill, DEVELOPMENT_PROBLEMS))


def add_iteration(store: Store, rng: random.Random, iteration: int, size: int = 64) -> None:
    prompt = store.save_prompt("short", "def merge_models(task_vectors):\n")
    store.save(
        Lineage(
            iteration=iteration, generator="zoo:seed", temperature=1.2 / (1 + 0.2 * (iteration - 1))
        )
    )
    scored = []
    for number in range(size):
        kind = rng.choices(
            ["new", "again", "refused", "nothing", "wrong signature", "timed out"],
            [50 - 8 * iteration, 10 + 6 * iteration, 15, 8, 10, 2],
        )[0]
        identity = f"{iteration:02}{number:04}" * 8
        source = (
            f"def merge_models(task_vectors):\n    # {number} of {iteration}\n"
            "    return 0.5 * task_vectors['expert_1']\n"
        )
        if number == 3:
            source += f"    # {HOSTILE}\n"
            kind = "new"
        if kind == "again" and scored:
            source = rng.choice(scored).text
        store.save(
            Sample(
                iteration=iteration,
                number=number,
                prompt=prompt,
                text=source,
                tokens=(1, 2),
                stopped=True,
                source=None if kind == "nothing" else source,
                parents=(f"{iteration - 1:02}0003" * 8, HOSTILE) if iteration > 1 else (),
                operation="combine" if iteration > 1 else None,
            )
        )
        if kind == "nothing" or (kind == "again" and scored):
            continue
        if kind not in ("new", "again"):
            rule = rng.choice(["import", "attribute", "syntax"]) if kind == "refused" else "shape"
            store.save(StoredVerdict(source=source, verdict=kind, rule=rule, message=HOSTILE[:400]))
            continue
        notes = ("scales expert_2", HOSTILE) if number == 3 else ()
        program = Program(
            identity=identity,
            source=source,
            ir="{}",
            in_training=rng.random() < 0.4,
            families=("mean", "sign"),
            held_out=() if rng.random() < 0.9 else ("max_magnitude",),
            notes=notes,
            cost=123456,
        )
        verdict = StoredVerdict(source=source, verdict="admitted", identity=identity)
        store.save(verdict, program)
        name = program_entry(identity)
        store.save(Entry(name=name, kind="program", identity=identity))
        change = rng.uniform(0, 1.5)
        store.save(Application(entry=name, change=change))
        skill = 0.9 if number == 3 else min(0.64, rng.gauss(0.38 + 0.04 * iteration, 0.09))
        results = outcomes(rng, skill, DEVELOPMENT_PROBLEMS)
        store.save_scores(name, "development", results)
        scored.append(
            ScoredSample(
                identity=identity,
                prompt=prompt,
                text=source,
                score=sum(one.strict for one in results) / len(results),
                change=change,
                iteration=iteration,
                number=number,
            )
        )
    config = SelectionConfig(chosen_percent=20, rejected_percent=20)
    store.save(
        *(
            StoredPair(iteration=iteration, number=n, chosen=pair.chosen, rejected=pair.rejected)
            for n, pair in enumerate(make_pairs(scored, [], config, key=0))
        )
    )
    store.save_phase(iteration, "generate", 12.5)
    store.save_phase(iteration, "score", 40.25)
    store.save(
        Checkpoint(
            name=f"generator-{iteration}",
            iteration=iteration,
            path=f"checkpoints/{iteration}",
            detail={"steps": 50, "loss": 0.61},
        )
    )


def add_test(store: Store, rng: random.Random, setting: str = "main") -> None:
    scores = {one.entry: one.strict for one in store.summaries("development")}
    programs = sorted((n for n in scores if n.startswith("program")), key=lambda n: -scores[n])[:5]
    baselines = [name for name in scores if not name.startswith("program")]
    for name in baselines + programs:
        skill = 0.05 + 0.95 * scores[name] - (0.03 if name in programs else 0)
        store.save_scores(name, "test", outcomes(rng, skill, TEST_PROBLEMS), setting=setting)


def whole_run(folder: Path, seed: int = 0) -> Store:
    rng = random.Random(seed)
    store = new_store(folder)
    add_baselines(store, rng)
    for iteration in (1, 2, 3):
        add_iteration(store, rng, iteration)
    add_test(store, rng)
    add_test(store, rng, "transfer")
    store.finish()
    return store


@pytest.fixture(scope="session")
def made_up() -> SimpleNamespace:
    return SimpleNamespace(
        new_store=new_store,
        add_baselines=add_baselines,
        add_iteration=add_iteration,
        add_test=add_test,
        outcomes=outcomes,
        whole_run=whole_run,
        hostile=HOSTILE,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run; read-only."""
    with whole_run(tmp_path_factory.mktemp("finished")) as store:
        yield store
