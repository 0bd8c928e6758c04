"""Endpoints against a server on this machine that answers well, badly, or never."""

import asyncio
import dataclasses
import json
import logging

import pytest

from sdjax.core.errors import TransientError, UserError
from sdjax.generators.chat_client import ChatClient, retry_after, waiting_time
from sdjax.generators.config import EndpointConfig
from sdjax.generators.endpoint import Endpoint, read_key
from sdjax.generators.failure_log import FailureLog
from sdjax.generators.recording import Recording
from sdjax.generators.types import GenerationRequest
from tests.generators.chat_server import PROGRAM, completion, http, serving

KEY = "sk-very-secret"


@pytest.fixture
def endpoint(tmp_path):
    """Return a function that makes the endpoint of a server, which does not wait between attempts.

    The waits that it is asked for are in `endpoint.waits`.
    """
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    def make(server, *, iteration=1, path=tmp_path / "answers" / "gpt.jsonl", **options):
        url = server if isinstance(server, str) else server.url
        fields = {"retries": 2, "max_tokens": 50, "timeout": 600.0} | options
        config = EndpointConfig(base_url=url, model="m", **fields)
        return Endpoint(
            name="gpt",
            config=config,
            key=KEY,
            recording=Recording(path, write=config.replay is None),
            temperature=0.5,
            top_p=0.9,
            rng_seed=3,
            iteration=iteration,
            make_client=lambda *arguments: ChatClient(*arguments, sleep=sleep),
        )

    make.waits = waits
    return make


def ask(endpoint, *numbers):
    requests = [GenerationRequest(number=n, prompt=f"Write program {n}.") for n in numbers]
    return dict(endpoint.texts(requests))


def test_answer_becomes_a_text_with_its_program(endpoint):
    with serving(completion(), completion("cut", finish="length")) as server:
        first = ask(endpoint(server), 0)[0]
        assert (first.source, first.stopped, first.tokens) == (PROGRAM, True, ())
        second = ask(endpoint(server), 1)[1]
        assert (second.text, second.source, second.stopped) == ("cut", None, False)
    head, body = server.requests[0]
    assert head.startswith("POST /v1/chat/completions ")
    assert f"authorization: bearer {KEY}" in head.lower()
    seed = body.pop("seed")
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Write program 0."}],
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert 0 <= seed < 2**31
    assert server.requests[1][1]["seed"] != seed


def test_fields_of_a_request_can_be_added_and_removed(endpoint):
    extra = {"seed": None, "max_tokens": None, "max_completion_tokens": 70}
    with serving(completion()) as server:
        ask(endpoint(server, extra_body=extra), 0)
    body = server.requests[0][1]
    assert body["max_completion_tokens"] == 70
    assert not {"seed", "max_tokens"} & body.keys()


def test_answers_are_asked_for_once_also_by_a_resumed_run(endpoint):
    with serving(completion()) as server:
        first = ask(endpoint(server), 0, 1)
        assert ask(endpoint(server), 0, 1, 2).keys() == {0, 1, 2}
        assert len(server.requests) == 3
        ask(endpoint(server, iteration=2), 0)  # another sample
        assert len(server.requests) == 4
    replayed = endpoint("http://127.0.0.1:1/v1", replay="elsewhere")  # no server
    assert ask(replayed, 0, 1) == first
    with pytest.raises(UserError, match="no answer to request 7 of iteration 1; replay it with"):
        ask(replayed, 7)


def test_incomplete_last_line_of_a_recording_is_asked_for_again(endpoint, tmp_path):
    path = tmp_path / "answers" / "gpt.jsonl"
    with serving(completion()) as server:
        ask(endpoint(server, concurrency=1), 0, 1)
        path.write_bytes(path.read_bytes()[:-9])
        assert ask(endpoint(server), 0, 1).keys() == {0, 1}
        assert len(server.requests) == 3
    assert all(json.loads(line)["text"] for line in path.read_text().splitlines())
    path.write_text('{"request": 5}\n')
    with pytest.raises(UserError, match="line 1: not a recorded answer"):
        endpoint(server)


TOO_MANY = http("slow down", "429 Too Many Requests", "Retry-After: 7")


@pytest.mark.parametrize(
    "response",
    [
        TOO_MANY,
        http("", "503 Service Unavailable"),
        http("<html><body>Welcome</body></html>"),
        http(b"\xff\xfe\x00garbage"),
        http('{"choices": {}}'),
        http('{"choices": [[]]}'),
        http('{"choices": [{"message": null}]}'),
        http('{"error": "overloaded"}'),
        http("[" * 100_000),
        http('{"choices": [', length=1000),  # cut
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"cho',  # cut
        b"no HTTP at all\r\n\r\n",
        b"",
    ],
)
def test_failed_attempt_is_repeated_and_logged(endpoint, response, caplog):
    with serving(response, completion()) as server, caplog.at_level(logging.WARNING):
        assert ask(endpoint(server), 0)[0].source == PROGRAM
    assert len(server.requests) == 2
    (line,) = caplog.messages
    assert line.startswith(f"generator gpt ({server.url}): ")
    assert "; attempt 1 of 3 failed, the next one is in " in line
    assert len(line.splitlines()) == 1
    (wait,) = endpoint.waits
    assert wait == 7 if response is TOO_MANY else 0.5 <= wait <= 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('{"choices": []}', "no choices"),
        ('{"choices": [{"message": {"content": null}}]}', "no content"),
        ('{"choices": [{"message": {"content": [{"text": "a"}]}}]}', "content that is not text"),
    ],
)
def test_answer_without_a_text_is_kept_as_such(endpoint, tmp_path, answer, problem):
    """It was paid for, and it is an answer: a sample without a program."""
    with serving(http(answer)) as server:
        text = ask(endpoint(server), 0)[0]
    assert (text.text, text.source, text.stopped) == ("", None, False)
    assert len(server.requests) == 1
    recorded = json.loads((tmp_path / "answers" / "gpt.jsonl").read_text())
    assert recorded["problem"] == problem
    assert recorded["tokens"] == len("Write program 0.") + 100 + 50  # the endpoint did not say


def test_request_without_an_answer_ends_the_run_but_keeps_the_answers(endpoint):
    with serving(completion(), TOO_MANY) as server:
        texts = endpoint(server, concurrency=1).texts(
            [GenerationRequest(number=n, prompt=f"Write program {n}.") for n in range(3)]
        )
        assert next(texts)[0] == 0
        with pytest.raises(
            TransientError, match=r"gpt .*: status 429, after 3 attempts; .*--resume"
        ):
            next(texts)
        assert len(server.requests) == 4  # nothing more was asked
        assert endpoint.waits == [7, 7]
    with serving(completion()) as server:
        assert ask(endpoint(server), 0, 1).keys() == {0, 1}
        assert len(server.requests) == 1


def test_log_of_many_failures_is_short_but_counts_them(caplog):
    times = iter([0, 1, 2, 3, 4, 5, 6, 31])
    log = FailureLog("generator gpt", clock=lambda: next(times))
    with caplog.at_level(logging.WARNING):
        for number in range(7):
            log.add(f"status {number}", attempt=1, max_attempts=3, wait=7)
        assert len(caplog.messages) == 5
        log.add("status 7", attempt=2, max_attempts=3, wait=0.5)
        log.close()  # nothing is left to say
    assert caplog.messages[5:] == [
        "generator gpt: status 7; attempt 2 of 3 failed, the next one is in 0.5 seconds "
        "(2 more failed attempts since the last line)"
    ]


def test_failures_without_a_line_are_counted_at_the_end(endpoint, caplog):
    with serving(*[TOO_MANY] * 6, completion()) as server, caplog.at_level(logging.WARNING):
        ask(endpoint(server, retries=9), 0)
    assert len(caplog.messages) == 6
    assert caplog.messages[-1].endswith(
        ": 1 more failed attempt since the last line, the last one: status 429"
    )


def test_endpoint_that_never_answers(endpoint):
    with serving(None) as server:
        slow = endpoint(server, timeout=0.5, retries=1)
        with pytest.raises(TransientError, match=r"no answer in 0\.5 seconds, after 2 attempts"):
            ask(slow, 0)
        # Both attempts may have been charged.
        assert slow.recording.tokens == 2 * (len("Write program 0.") + 150)
    with pytest.raises(TransientError, match="cannot connect"):
        ask(endpoint(server.url), 1)


def test_refusal_is_not_repeated_and_hides_the_key(endpoint):
    refusal = http(json.dumps({"error": {"message": f"Incorrect key: {KEY}"}}), "401 Unauthorized")
    with serving(refusal) as server:
        with pytest.raises(UserError, match=r"status 401 .*check the key in the env") as caught:
            ask(endpoint(server, concurrency=1), 0, 1)
        assert KEY not in str(caught.value)
        assert len(server.requests) == 1
    moved = http("", "307 Moved", "Location: http://127.0.0.1:9/")
    with serving(moved) as server, pytest.raises(UserError, match="redirects are not followed"):
        ask(endpoint(server), 0)


def test_answer_that_repeats_the_key_is_kept_without_it(endpoint, tmp_path):
    with serving(completion(f"# {KEY}")) as server:
        assert ask(endpoint(server), 0)[0].text == "# [key]"
    assert KEY not in (tmp_path / "answers" / "gpt.jsonl").read_text()
    assert KEY not in repr(endpoint(server))


def test_concurrency_is_limited(endpoint):
    with serving(completion(), together=3) as server:
        assert ask(endpoint(server, concurrency=3), *range(9)).keys() == set(range(9))
    assert (server.most_running, len(server.requests)) == (3, 9)


def test_budget_ends_the_requests_and_is_replayed(endpoint, caplog, tmp_path):
    size = len("Write program 0.") + 150
    with serving(completion(usage=(60, 40))) as server:
        with caplog.at_level(logging.WARNING):
            texts = ask(endpoint(server, max_tokens_total=size + 300), *range(9))
        # The fifth request would need `size` tokens of the remaining size + 300 - 4 * 100.
        assert texts.keys() == {0, 1, 2, 3}
        assert "5 requests are not made, since 400 of max_tokens_total = 466" in caplog.text
        assert ask(endpoint(server, max_tokens_total=size + 300), *range(9)) == texts
        assert len(server.requests) == 4
        assert ask(endpoint(server, replay="x", max_tokens_total=1), *range(9)) == texts
        larger = endpoint(server, max_tokens_total=size + 400)
        assert ask(larger, *range(9)).keys() == {0, 1, 2, 3, 4}


def test_repeated_requests_keep_the_budget(endpoint, caplog):
    """A lost attempt may have been charged, so that a third one would exceed the budget."""
    size = len("Write program 0.") + 150
    with serving(b"", b"", completion()) as server:
        with caplog.at_level(logging.WARNING):
            poor = endpoint(server, retries=9, max_tokens_total=3 * size - 1)
            assert ask(poor, 0, 1) == {}
        assert len(server.requests) == 2
        assert poor.recording.tokens == 2 * size
        assert "a request without an answer is not repeated, since 332 of max_t" in caplog.text
        assert ask(endpoint(server, replay="x"), 0, 1) == {}
        assert ask(endpoint(server, max_tokens_total=3 * size), 0)[0].source == PROGRAM


def test_endpoint_works_inside_an_event_loop(endpoint):
    """A notebook has one."""

    async def cell():
        return ask(endpoint(server), 0)

    with serving(completion()) as server:
        assert asyncio.run(cell())[0].source == PROGRAM


def test_too_large_answer_is_not_read_to_its_end(endpoint, monkeypatch):
    monkeypatch.setattr("sdjax.generators.chat_client.MAX_ANSWER_BYTES", 1000)
    with serving(http(b"x" * 1001, length=10**12), completion()) as server:
        assert ask(endpoint(server), 0)[0].source == PROGRAM


def test_waits_grow_have_jitter_and_respect_the_endpoint():
    assert [waiting_time(n, 0, 0) for n in (1, 2, 3, 20, 500)] == [0.5, 1, 2, 30, 30]
    assert waiting_time(1, 0, 0.999) == pytest.approx(1, abs=1e-3)
    assert waiting_time(1, 20, 0.5) == 20
    assert waiting_time(1, 1e9, 0.5) == 600
    assert retry_after("3.5", 0) == 3.5
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 50) == 10
    assert [retry_after(text, 0) for text in (None, "soon", "-3", "nan", "")] == [0] * 5


def test_key_comes_from_the_environment(monkeypatch):
    config = EndpointConfig(base_url="https://host/v1", model="m", api_key_env="GPT_KEY")
    monkeypatch.delenv("GPT_KEY", raising=False)
    with pytest.raises(UserError, match="GPT_KEY is not set"):
        read_key(config)
    assert read_key(dataclasses.replace(config, replay="file")) is None
    monkeypatch.setenv("GPT_KEY", "two\nlines")
    with pytest.raises(UserError, match="does not contain a key") as caught:
        read_key(config)
    assert "lines" not in str(caught.value)
    monkeypatch.setenv("GPT_KEY", f" {KEY}\n")
    assert read_key(config) == KEY


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be an address"),
        ({"base_url": "file:///etc/passwd"}, "base_url must be an address"),
        ({"base_url": "http://[::1"}, "base_url must be an address"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "must not contain a name, a password"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "must not contain a name, a password"),
        ({"api_key_env": KEY}, "the name of an environment variable"),
        ({"base_url": "https://host/v1/chat/completions/"}, "must end before /chat/completions"),
        ({"extra_body": {"messages": []}}, "must not contain messages"),
        ({"extra_body": {"temperature": float("nan")}}, r"must be JSON, which has no .*\.nan"),
        ({"extra_body": {"a": [{"b": -float("inf")}]}}, "must be JSON, which has no infinite"),
        ({"extra_body": {"max_tokens": "50"}}, "max_tokens must be a whole number of at least 1"),
        ({"extra_body": {"max_completion_tokens": 0}}, "max_completion_tokens must be a whole"),
        (
            {"extra_body": {"max_tokens": None}, "max_tokens_total": 1000},
            "removes max_tokens, without which max_tokens_total cannot be kept",
        ),
    ],
)
def test_config_of_an_endpoint_is_checked_without_showing_a_key(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        EndpointConfig(**{"base_url": "https://host/v1", "model": "m"} | fields)
    assert all(KEY not in str(error["ctx"]["error"]) for error in caught.value.errors())
