"""Comparison of answers in confined workers: correct, within limits, without side effects."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from sdjax.evaluation.answer_worker import prepare
from sdjax.evaluation.grader import Grader
from sdjax.evaluation.task import NotGradedError

HOSTILE = {
    "a tower": "9^{9^{9^9}}",
    "a factorial": "(9^9)!!",
    "depth": "(" * 20_000 + "1" + ")" * 20_000,
    "length": "1+" * 50_000 + "1",
    "an import": "__import__('os').system('touch {canary}')",
    "eval": "eval(\"open('{canary}','w')\")",
    "an attribute": "().__class__.__base__.__subclasses__()",
    "a lambda": "(lambda: open('{canary}','w'))()",
    "NUL": "1\x00",
    "a lone surrogate": "\ud800",
    "words": "\\text{" + "a" * 10_000 + "}",
    "backslashes": "\\" * 10_001,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_neither_hang_nor_execute(name, grader, tmp_path):
    canary = tmp_path / "canary"
    equal = False
    with contextlib.suppress(NotGradedError):
        equal = grader.same("2", HOSTILE[name].replace("{canary}", str(canary)))
    assert not equal
    assert not canary.exists()


def test_endless_comparison_is_not_graded(grader):
    with pytest.raises(NotGradedError, match="grading timed out"):
        grader.same("1", HOSTILE["a tower"])
    assert not grader.same("1", "2")


def test_workers_agree_with_code_outside_the_sandbox(grader):
    """Check that workers have all modules that the comparison imports lazily."""
    work = prepare("")
    pairs = [
        (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"\int_0^{\pi} \sin x\,dx", "2"),
        (r"\sum_{k=1}^{\infty} \frac{1}{2^k}", "1"),
        (r"\lim_{x\to 0} \frac{\sin x}{x}", "1"),
        (r"\left(\frac{1}{2}\right)^{-3}", "8"),
        (r"x \in (-\infty,-1) \cup (1,\infty)", "|x|>1"),
        (r"\sqrt[3]{x^3+3x^2+3x+1}", "x+1"),
        (r"\arctan 1", r"\frac{\pi}{4}"),
        (r"\cos 2x", r"2\cos^2 x-1"),
        (r"\gcd(12,18)", "6"),
        ("x^2=4", r"x=\pm 2"),
        (r"\overline{3}", "3"),
    ]
    for gold, answer in pairs:
        outside = json.loads(work(json.dumps([gold, answer]).encode()))["equal"]
        assert grader.same(gold, answer) == outside, (gold, answer)


def test_grader_is_thread_safe(grader):
    results = {}

    def grade(number):
        results[number] = grader.same("0.5", rf"\frac{{{number}}}{{8}}")

    threads = [threading.Thread(target=grade, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number == 4 for number in range(6)}


def test_killed_dispatcher_is_replaced_and_no_process_survives():
    grader = Grader(workers=1)
    server = grader._server.pid
    (dispatcher,) = children(server)
    os.kill(dispatcher, signal.SIGKILL)
    assert grader.same("0.5", r"\frac12")
    assert grader._server.pid != server
    remaining = [grader._server.pid, *children(grader._server.pid)]
    grader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in (server, dispatcher, *remaining))


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
