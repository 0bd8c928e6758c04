"""Replies of the compiling worker, which a program may forge."""

import json

import pytest

from sdjax.isolation.pool import Reply
from sdjax.isolation.server import DIED, DONE, NOT_STARTED, OUT_OF_CPU, OUT_OF_TIME, TOO_LONG
from sdjax.sandbox.config import Limits
from sdjax.sandbox.findings import Findings
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.replies import parse_probe, parse_trial

SLOTS = ("expert_1", "expert_2")
HASH = "0123456789abcdef" * 4


def _reply(data: object) -> Reply:
    return Reply(key=0, status=DONE, data=json.dumps(data).encode())


def test_findings_are_read():
    note = "plain scaling of one task vector: expert_2"
    data = {"fingerprint": HASH, "notes": [note]}
    found = parse_probe(_reply(data), Limits(), SLOTS)
    assert found == Findings(fingerprint=HASH, notes=(note,))
    assert parse_trial(_reply({}), Limits()) is None


@pytest.mark.parametrize(
    "data",
    [
        [],
        None,
        {},
        {"fingerprint": HASH},
        {"fingerprint": HASH, "notes": "equals the seed"},
        {"fingerprint": HASH, "notes": ["equals the seed", "equals the seed"]},
        {"fingerprint": HASH, "notes": ["equals an expert: expert_3"]},
        {"fingerprint": HASH, "notes": ["<script>"]},
        {"fingerprint": HASH, "notes": [["equals the seed"]]},
        {"fingerprint": HASH[1:], "notes": []},
        {"fingerprint": HASH[1:] + "/", "notes": []},
        {"fingerprint": 1, "notes": []},
        {"fingerprint": HASH, "notes": [], "ir": "{}"},
        {"verdict": "admitted", "rule": "x", "message": ""},
        {"verdict": "timed out", "rule": "x", "message": ""},
        {"verdict": "non-finite", "rule": "<b>", "message": ""},
        {"verdict": "non-finite", "rule": "x", "message": 1},
        {"verdict": ["refused"], "rule": "x", "message": ""},
    ],
)
def test_forged_findings_are_refused(data):
    refusal = parse_probe(_reply(data), Limits(), SLOTS)
    assert isinstance(refusal, Refusal)
    assert (refusal.verdict, refusal.rule) == ("compiler", "worker")
    if data != {}:
        refusal = parse_trial(_reply(data), Limits())
        assert (refusal.verdict, refusal.rule) == ("compiler", "worker")


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff", b'{"fingerprint": "'])
def test_replies_that_are_not_json_are_refused(data):
    reply = Reply(key=0, status=DONE, data=data)
    assert parse_probe(reply, Limits(), SLOTS).rule == "worker"
    assert parse_trial(reply, Limits()).rule == "worker"


@pytest.mark.parametrize(
    ("status", "rule"),
    [
        (OUT_OF_CPU, "cpu"),
        (OUT_OF_TIME, "wall-clock"),
        (DIED, "crash"),
        (TOO_LONG, "crash"),
        (NOT_STARTED, "worker"),
    ],
)
def test_failures_of_the_compiler_are_its_verdict(status, rule):
    reply = Reply(key=0, status=status)
    for refusal in (parse_probe(reply, Limits(), SLOTS), parse_trial(reply, Limits())):
        assert (refusal.verdict, refusal.rule) == ("compiler", rule)
