"""Prompts, decoding and grading of problems of the zoo."""

import dataclasses

import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.arithmetic import ArithmeticTask
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import model_folder
from sdjax.io.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def seed():
    folder = model_folder("zoo:seed")
    config, params = load_model(folder)
    settings = DecoderConfig(slots=4, prefill_batch=4, buckets=(32,), max_new_tokens=8)
    return Decoder(config, settings), load_tokenizer(folder), params


def test_too_long_prompt_does_not_affect_others(seed):
    decoder, tokenizer, params = seed
    task = ArithmeticTask(test=6)
    problems = task.problems("test")
    long = dataclasses.replace(problems[0], id="long", question="1+" * 100 + "1=")
    reported = []
    outcomes = evaluate_problems(
        decoder,
        tokenizer,
        params,
        task,
        build_prompts(task, [*problems[:3], long, *problems[3:]], tokenizer),
        on_outcome=reported.append,
    )
    alone = evaluate_problems(
        decoder, tokenizer, params, task, build_prompts(task, problems, tokenizer)
    )
    assert [one for one in outcomes if one.problem_id != "long"] == alone
    assert not outcomes[3].strict
    assert not outcomes[3].flexible
    assert "tokens, more than the maximum of 32" in outcomes[3].failure
    assert sorted(one.problem_id for one in reported) == sorted(one.problem_id for one in outcomes)


def test_error_of_a_task_fails_one_problem_only(seed):
    class Failing(ArithmeticTask):
        def grade(self, extracted: str, problem: Problem) -> bool:
            if problem.id == "test-3":
                raise ZeroDivisionError("mine")
            return super().grade(extracted, problem)

    decoder, tokenizer, params = seed
    outcomes = []
    for task in (ArithmeticTask(test=6), Failing(test=6)):
        problems = build_prompts(task, task.problems("test"), tokenizer)
        outcomes.append(evaluate_problems(decoder, tokenizer, params, task, problems))
    expected, found = outcomes
    assert found[3].failure.endswith("Failing: grade raised ZeroDivisionError: mine")
    assert not found[3].strict
    assert [found[i] for i in (0, 1, 2, 4, 5)] == [expected[i] for i in (0, 1, 2, 4, 5)]


def test_prompt_hash_identifies_the_prompt(seed):
    _, tokenizer, _ = seed
    task = ArithmeticTask(test=2)
    first, second = build_prompts(task, task.problems("test"), tokenizer)
    assert len(first.sha256) == 64
    assert first.sha256 != second.sha256
    assert first.sha256 == build_prompts(task, task.problems("test"), tokenizer)[0].sha256
