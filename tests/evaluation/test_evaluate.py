"""Prompts, decoding and grading of the zoo's problems."""

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


def test_a_prompt_that_does_not_fit_is_a_failure_and_the_rest_goes_on(seed):
    decoder, tokenizer, params = seed
    task = ArithmeticTask(test=6)
    problems = task.problems("test")
    long = dataclasses.replace(problems[0], id="long", question="1+" * 100 + "1=")
    told = []
    outcomes = evaluate_problems(
        decoder,
        tokenizer,
        params,
        task,
        build_prompts(task, [*problems[:3], long, *problems[3:]], tokenizer),
        on_outcome=told.append,
    )
    alone = evaluate_problems(
        decoder, tokenizer, params, task, build_prompts(task, problems, tokenizer)
    )
    assert [one for one in outcomes if one.problem_id != "long"] == alone
    assert not outcomes[3].strict
    assert not outcomes[3].flexible
    assert "tokens, more than the maximum of 32" in outcomes[3].failure
    assert sorted(one.problem_id for one in told) == sorted(one.problem_id for one in outcomes)


def test_what_a_task_raises_over_one_output_does_not_stop_the_rest(seed):
    class Squeamish(ArithmeticTask):
        def grade(self, extracted: str, problem: Problem) -> bool:
            if problem.id == "test-3":
                raise ZeroDivisionError("mine")
            return super().grade(extracted, problem)

    decoder, tokenizer, params = seed
    told = []
    for task in (ArithmeticTask(test=6), Squeamish(test=6)):
        problems = build_prompts(task, task.problems("test"), tokenizer)
        told.append(evaluate_problems(decoder, tokenizer, params, task, problems))
    expected, found = told
    assert found[3].failure.endswith("Squeamish: grade raised ZeroDivisionError: mine")
    assert not found[3].strict
    assert [found[i] for i in (0, 1, 2, 4, 5)] == [expected[i] for i in (0, 1, 2, 4, 5)]


def test_a_prompt_is_told_by_its_hash(seed):
    _, tokenizer, _ = seed
    task = ArithmeticTask(test=2)
    first, second = build_prompts(task, task.problems("test"), tokenizer)
    assert len(first.sha256) == 64
    assert first.sha256 != second.sha256
    assert first.sha256 == build_prompts(task, task.problems("test"), tokenizer)[0].sha256
