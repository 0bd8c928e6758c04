"""The generator of an OpenAI-compatible endpoint, several requests at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sdjax.core.errors import UserError
from sdjax.generators.chat_client import ChatClient
from sdjax.generators.config import EndpointConfig
from sdjax.generators.recording import RecordedAnswer, Recording, request_digest
from sdjax.generators.types import GeneratedText, GenerationRequest, Texts
from sdjax.programs.extraction import extract_source

T = TypeVar("T")

_OVERHEAD_TOKENS = 100  # of the roles and marks around a message

logger = logging.getLogger(__name__)


def read_key(config: EndpointConfig) -> str | None:
    """Return the key of an endpoint from the environment; None if it has none.

    Raises:
        UserError: the variable is not set, or does not contain a key.
    """
    name = config.api_key_env
    if name is None or config.replay is not None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} is not set; set it to the key")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the environment variable {name} does not contain a key; set it again")
    return key


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Endpoint:
    """An endpoint with everything that determines the requests of an iteration.

    Attributes:
        name: name of the generator.
        config: config of the endpoint.
        key: the key, or None.
        recording: the answers so far, and those to come; with `replay`, those of an earlier run.
        temperature: sampling temperature.
        top_p: nucleus sampling threshold.
        rng_seed: seed of the run.
        iteration: number of the iteration.
        make_client: makes the client.
    """

    name: str
    config: EndpointConfig
    key: str | None = dataclasses.field(repr=False)
    recording: Recording
    temperature: float
    top_p: float
    rng_seed: int
    iteration: int
    make_client: Callable[[str, EndpointConfig, str | None], ChatClient] = ChatClient

    def texts(self, requests: Sequence[GenerationRequest]) -> Texts:
        """Yield the answers; see `sdjax.generators.types.TextSource`.

        Recorded answers come first. The others are asked for in the order of the requests. When
        the next request may exceed the budget, nothing more is asked.

        Raises:
            UserError: the endpoint refuses a request, or a replay lacks it.
            TransientError: an answer did not come in all attempts; those that came are recorded.
        """
        asked = [(request, self._body(request)) for request in requests]
        waiting = deque[_Request]()
        for request, body in asked:
            digest = request_digest(body, self.iteration, request.number)
            recorded = self.recording.find(digest)
            if recorded is not None:
                yield request.number, _text(recorded)
            else:
                waiting.append(
                    _Request(
                        number=request.number,
                        body=body,
                        digest=digest,
                        max_tokens=self._max_tokens(request.prompt),
                    )
                )
        if self.config.replay is not None:
            self._check_replayed(waiting)
        elif waiting:
            with self.recording:
                yield from self._ask(waiting)

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": self.config.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": _request_seed(self.rng_seed, self.name, self.iteration, request.number),
        }
        body |= self.config.extra_body
        return {name: value for name, value in body.items() if value is not None}

    def _max_tokens(self, prompt: str) -> int:
        """Return an upper bound of the tokens of prompt and answer: a token has a byte or more."""
        size = len(prompt.encode("utf-8", "replace"))
        return size + _OVERHEAD_TOKENS + self.config.max_answer_tokens

    def _check_replayed(self, missing: Sequence[_Request]) -> None:
        for request in missing:
            if not self.recording.was_beyond_budget(request.digest):
                raise UserError(
                    f"{self.recording.path}: no answer to request {request.number} of iteration "
                    f"{self.iteration}; replay it with the config of the run that recorded it, or "
                    f"set generators.{self.name}.endpoint.replay to null"
                )

    def _ask(self, waiting: deque[_Request]) -> Texts:
        # In a thread, since the caller may be in an event loop, as in a notebook.
        with _event_loop() as run:
            client = self.make_client(self.name, self.config, self.key)
            conversation = _Conversation(self, client, waiting)
            run(client.__aenter__())
            try:
                while (answer := run(conversation.next_answer())) is not None:
                    yield answer[0], _text(answer[1])
            finally:
                run(conversation.close())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """A request that has no recorded answer.

    Attributes:
        number: number of the sample.
        body: JSON body.
        digest: see `request_digest`.
        max_tokens: upper bound of the tokens of prompt and answer.
    """

    number: int
    body: Mapping[str, Any]
    digest: str
    max_tokens: int


class _BudgetExceededError(Exception):
    """The budget does not allow to repeat a request."""


class _Conversation:
    """The requests of one call: those that wait, and those in progress."""

    def __init__(self, endpoint: Endpoint, client: ChatClient, waiting: deque[_Request]) -> None:
        self._endpoint = endpoint
        self._client = client
        self._waiting = waiting
        self._tasks: dict[asyncio.Task[RecordedAnswer | None], _Request] = {}
        self._error: UserError | None = None

    async def next_answer(self) -> tuple[int, RecordedAnswer] | None:
        """Return number and answer of the next request that ends; None after the last one.

        After an error nothing more is asked, and the requests in progress end first.
        """
        while True:
            self._start()
            if not self._tasks:
                if self._error is not None:
                    raise self._error
                return None
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            task = next(iter(done))
            request = self._tasks.pop(task)
            try:
                answer = task.result()
                if answer is not None:
                    return request.number, answer
            except UserError as error:
                self._error = self._error or error
                self._client.stop()

    async def close(self) -> None:
        """End all requests and close the client."""
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.__aexit__()

    def _start(self) -> None:
        """Start requests, up to the limits of concurrency and budget."""
        config = self._endpoint.config
        while self._waiting and len(self._tasks) < config.concurrency and self._error is None:
            if self._exceeds_budget(self._waiting[0].max_tokens):
                if not self._tasks:  # nothing will be left over from those in progress
                    self._end_of_budget(
                        f"{len(self._waiting)} requests are not made", self._waiting
                    )
                    self._waiting.clear()
                return
            request = self._waiting.popleft()
            self._tasks[asyncio.create_task(self._answer(request))] = request

    def _exceeds_budget(self, further: int) -> bool:
        """Return whether further tokens do not fit, in addition to the requests in progress."""
        budget = self._endpoint.config.max_tokens_total
        if budget is None:
            return False
        reserved = sum(one.max_tokens for one in self._tasks.values())
        return self._endpoint.recording.tokens + reserved + further > budget

    def _end_of_budget(self, event: str, requests: Iterable[_Request]) -> None:
        endpoint = self._endpoint
        logger.warning(
            "generator %s: %s, since %s of max_tokens_total = %s tokens are "
            "used up; raise it to ask more",
            endpoint.name,
            event,
            f"{endpoint.recording.tokens:,}",
            f"{endpoint.config.max_tokens_total:,}",
        )
        for request in requests:
            endpoint.recording.add_beyond_budget(request.digest)

    async def _answer(self, request: _Request) -> RecordedAnswer | None:
        """Return the answer to a request, which is recorded at once; None if the budget ends it."""
        recording = self._endpoint.recording

        def record_loss(reason: str) -> None:
            recording.add(
                RecordedAnswer(
                    request=request.digest,
                    answered=False,
                    tokens=request.max_tokens,
                    problem=reason,
                )
            )
            if self._exceeds_budget(0):  # the request itself is in progress
                raise _BudgetExceededError

        try:
            answer = await self._client.complete(request.body, on_loss=record_loss)
        except _BudgetExceededError:
            self._end_of_budget("a request without an answer is not repeated", [request])
            return None
        key = self._endpoint.key
        recorded = RecordedAnswer(
            request=request.digest,
            text=answer.text.replace(key, "[key]") if key and answer.text else answer.text,
            stopped=answer.stopped,
            tokens=request.max_tokens if answer.tokens is None else answer.tokens,
            problem=answer.problem,
        )
        recording.add(recorded)
        return recorded


def _text(answer: RecordedAnswer) -> GeneratedText:
    text = answer.text or ""
    return GeneratedText(text=text, source=extract_source(text), stopped=answer.stopped)


def _request_seed(*parts: str | int) -> int:
    """Return the seed of a request, in [0, 2**31)."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@contextmanager
def _event_loop() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Yield a function that runs a coroutine in the event loop of another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="endpoint", daemon=True)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
