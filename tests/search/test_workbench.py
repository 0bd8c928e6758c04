"""How a run puts problems to its models."""

import dataclasses
import json

import pytest

from sdjax.errors import UserError
from sdjax.search.config import DecodingConfig, TaskConfig
from sdjax.search.workbench import prepare


@pytest.fixture
def sums(small_config, tmp_path):
    """The small run on a file of six sums, with worked examples beside it."""
    for split, count in (("test", 6), ("train", 4)):
        rows = [{"question": f"{split} 1+{i}=", "answer": 1 + i} for i in range(count)]
        (tmp_path / f"sums_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TaskConfig(name=str(tmp_path / "sums_test.jsonl"), development=2, shots=2)
    sizes = DecodingConfig(slots=4, rows=4, buckets=(96,), max_new_tokens=8)
    return dataclasses.replace(small_config, task=task, evaluation=sizes)


def test_worked_examples_and_splits(sums):
    bench = prepare(sums)
    assert [one.problem.id for one in bench.problems["development"]] == ["test-0", "test-1"]
    assert len(bench.problems["test"]) == 4
    for one in bench.problems["test"]:
        *shown, asked = one.text.split("\n\n")
        assert len(shown) == 2
        assert all(example.startswith("train 1+") for example in shown)
        assert asked == f"{one.problem.question}\nA:"


def with_task(config, **changes):
    return dataclasses.replace(config, task=dataclasses.replace(config.task, **changes))


def test_what_cannot_be_put_is_told_before_the_run(sums):
    with pytest.raises(UserError, match="no chat template"):
        prepare(with_task(sums, prompt="chat"))
    with pytest.raises(UserError, match="has no test problem"):
        prepare(with_task(sums, development=6))
    small = DecodingConfig(slots=4, rows=4, buckets=(8,), max_new_tokens=8)
    with pytest.raises(UserError, match=r"every development prompt is longer .* \(8\)"):
        prepare(dataclasses.replace(sums, evaluation=small))
