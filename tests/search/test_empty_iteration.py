"""Iterations in which the generator writes no program that can be scored."""

import dataclasses

import pytest

from sdjax.core.errors import UserError
from sdjax.search import loop
from sdjax.search.iteration_scores import score_programs
from sdjax.search.loop import run_search
from sdjax.search.phases import judge
from sdjax.search.refinement import choose_training_data
from sdjax.search.score_types import Answer
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.types import Checkpoint, Sample

HEAD = "def merge_models(task_vectors):\n"
GOOD = HEAD + "    return 0.5 * task_vectors['expert_1']\n"
REFUSED = HEAD + "    import os\n    return task_vectors['expert_1']\n"


@pytest.fixture
def store(context, tmp_path):
    config = context.config.to_json()
    with Store.create(tmp_path / "run", config=config, versions={}, layers=[]) as store:
        save_settings(context, store)
        yield store


def write(store, iteration, texts):
    """Save samples; a text without a function does not count as a program."""
    prompt = store.save_prompt("short", "")
    for number, text in enumerate(texts):
        source = text if "def" in text else None
        key = {"prompt": prompt, "text": text, "tokens": (1,), "stopped": True}
        store.save(Sample(iteration=iteration, number=number, source=source, **key))


def test_first_iteration_without_programs_is_an_error_with_reasons(context, store, sandbox):
    write(store, 1, ["no", REFUSED, "nothing"])
    judge(context, store, sandbox, iteration=1)
    score_programs(context, store, sandbox, iteration=1)
    reasons = r"2 no program, 1 refused \(.+\); for example sample 1: .*import.*: 'def merge_models"
    with pytest.raises(UserError, match=reasons):
        choose_training_data(context, store, iteration=1)


def test_later_iteration_without_programs_has_no_pairs(context, store, sandbox, caplog):
    write(store, 1, [GOOD, "nothing"])
    write(store, 2, ["nothing"])
    judge(context, store, sandbox, iteration=1)
    score_programs(context, store, sandbox, iteration=1)
    choose_training_data(context, store, iteration=1)
    assert choose_training_data(context, store, iteration=2).is_empty
    assert "no program of iteration 2 could be scored (1 no program; for example" in caplog.text


@pytest.mark.slow
def test_run_goes_on_after_an_iteration_without_programs(small_config, tmp_path, monkeypatch):
    sample = loop.generate

    def nothing_in_the_second(context, store, adapter, *, iteration, **options):
        if iteration == 2:
            return write(store, 2, ["nothing"] * options["count"])
        return sample(context, store, adapter, iteration=iteration, **options)

    monkeypatch.setattr(loop, "generate", nothing_in_the_second)
    config = dataclasses.replace(small_config, iterations=3)
    run_search(config, tmp_path / "run")
    with Store.open(tmp_path / "run") as store:
        assert store.run().finished_at is not None
        assert [one.detail["pairs"] > 0 for one in store.select(Checkpoint)] == [True, False]
        assert {one.status for one in store.judged(2)} == {"no program"}
        assert any(one.novel for one in store.judged(3))
        assert len(store.select(Answer)) == 1
