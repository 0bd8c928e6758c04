"""`sdjax merge --run`: merge by a discovered program."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sdjax.cli.merge_discovered import merge_discovered
from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.merging.recipe.from_algorithm import open_models
from sdjax.programs.signature import merge_signature
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.config import read_config
from sdjax.search.context import RunContext, run_key
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    Entry,
    Program,
    Sample,
    Setting,
    StoredVerdict,
    program_entry,
)

PROGRAM = """def merge_models(task_vectors):
    return 0.5 * (task_vectors["expert_1"] + task_vectors["expert_2"])
"""


@pytest.fixture
def run(tmp_path):
    """A run with two scored programs, the second better than the first."""
    config = read_config("configs/demo.yaml")
    experts = {slot: config.experts[slot].model for slot in config.slots}
    signature = merge_signature(open_models(config.seed, experts, Path.cwd()), config.scope)
    sources = [PROGRAM, PROGRAM.replace("0.5", "0.6")]
    folder = tmp_path / "run"
    with (
        Sandbox(signature, workers=1) as sandbox,
        Store.create(folder, config=config.to_json(), versions={}, layers=()) as store,
    ):
        store.save_setting(
            Setting(seed=config.seed, slots=experts, scope=config.scope, task=config.task.name)
        )
        prompt = store.save_prompt("short", "def\n")
        for number, (source, correct) in enumerate(zip(sources, (1, 2), strict=True)):
            verdict = sandbox.judge(source)
            store.save(
                Sample(
                    iteration=1,
                    number=number,
                    prompt=prompt,
                    text=source,
                    tokens=(1,),
                    stopped=True,
                    source=source,
                )
            )
            program = Program(identity=verdict.identity, source=source, ir=verdict.ir)
            store.save(StoredVerdict.of(source, verdict), program)
            name = program_entry(verdict.identity)
            store.save(Entry(name=name, kind="program", identity=verdict.identity))
            outcomes = [
                Outcome(problem_id=str(i), output="", strict=i < correct, flexible=i < correct)
                for i in range(3)
            ]
            store.save_scores(name, DEVELOPMENT, outcomes)
    return folder


def test_merge_by_rank(tmp_path, run):
    merge_discovered(run, 1, tmp_path / "best")
    assert "0.6 *" in (tmp_path / "best" / "program.py").read_text()
    merge_discovered(run, 2, tmp_path / "second")
    assert "0.5 *" in (tmp_path / "second" / "program.py").read_text()
    best, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("best", "second")
    )
    assert best != second
    with pytest.raises(UserError, match="no program of rank 3: the run has 2 scored programs"):
        merge_discovered(run, 3, tmp_path / "third")
    with pytest.raises(UserError, match="not a run folder"):
        merge_discovered(tmp_path / "nothing", 1, tmp_path / "third")


def test_merge_uses_the_key_of_the_run():
    context = SimpleNamespace(config=SimpleNamespace(rng_seed=3))
    assert run_key(3, "merge") == RunContext.key(context, "merge")
