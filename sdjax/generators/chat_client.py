"""Client of an OpenAI-compatible endpoint: one chat completion, with retries.

`httpx2`, which huggingface_hub needs anyway, sends the requests. The `openai` package would add its
own dependencies, and has neither a limit for the size of an answer nor one for its total duration,
so its retries could not be used. Redirects are not followed, so that the key goes to no other host.

An answer is untrusted. Whatever comes back ends in a text, in an answer without one, or in an error
of one line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

import httpx2

from sdjax.core.errors import TransientError, UserError, truncated_repr
from sdjax.core.json import parse_json
from sdjax.generators.config import EndpointConfig
from sdjax.generators.failure_log import FailureLog

MAX_ANSWER_BYTES = 2 << 20
_MAX_TOKENS = 1_000_000_000  # that a request can have used
_FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one
_MAX_WAIT = 60.0
_MAX_RETRY_AFTER = 600.0  # that an endpoint may demand
_RETRIED = (408, 409, 425, 429)  # and those from 500
_SHOWN = 200  # characters of an answer in an error message


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """A well-formed answer.

    Attributes:
        text: the text of the first choice; None if it has none.
        stopped: whether the text is complete, rather than cut at the token limit.
        tokens: tokens of prompt and answer; None if they are not reported.
        problem: reason for a missing text; empty otherwise.
    """

    text: str | None
    stopped: bool
    tokens: int | None
    problem: str = ""


class _Failed(Exception):
    """An attempt that may succeed later."""

    def __init__(self, reason: str, *, sent: bool, retry_after: float = 0.0) -> None:
        """Describe the attempt.

        Args:
            reason: what is wrong, as a clause.
            sent: whether the endpoint may have written, and charged, an answer.
            retry_after: seconds that the endpoint asks to wait for.
        """
        super().__init__(reason)
        self.sent = sent
        self.retry_after = retry_after


class ChatClient:
    """Client of one endpoint; an asynchronous context manager."""

    def __init__(
        self,
        name: str,
        config: EndpointConfig,
        key: str | None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Configure the client; nothing is sent.

        Args:
            name: name of the generator, for error messages.
            config: config of the endpoint.
            key: the key, which is sent but never shown.
            sleep: waits before a further attempt.
        """
        self._where = f"generator {name} ({config.base_url})"
        self._config = config
        self._key = key
        self._sleep = sleep
        self._failures = FailureLog(self._where)
        self._url = config.url
        self.is_stopping = False

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=self._config.timeout,
            limits=httpx2.Limits(max_connections=self._config.concurrency),
            follow_redirects=False,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._failures.close()
        await self._http.aclose()

    async def complete(
        self, body: Mapping[str, Any], *, on_loss: Callable[[str], None]
    ) -> ChatAnswer:
        """Return the answer to a request; repeat the request while it fails, which is logged.

        Args:
            body: its JSON body.
            on_loss: is called with the reason if an attempt failed after the request was sent, so
                that the endpoint may have charged it.

        Raises:
            UserError: the endpoint refuses the request, which a repetition would not change.
            TransientError: all attempts failed, or the last one before `stop` was called.
        """
        attempt = 0
        while True:
            try:
                return _parse(await self._post(body))
            except _Failed as failure:
                reason = self._redacted(str(failure))
                if failure.sent:
                    on_loss(reason)
                attempt += 1
                if attempt > self._config.retries or self.is_stopping:
                    attempts = f"{attempt} attempt{'s' if attempt > 1 else ''}"
                    raise TransientError(
                        f"{self._where}: {reason}, after {attempts}; check the endpoint. The "
                        "answers so far are kept: use --resume"
                    ) from None
                wait = waiting_time(attempt, failure.retry_after, random.random())
                self._failures.add(
                    reason, attempt=attempt, max_attempts=self._config.retries + 1, wait=wait
                )
                await self._sleep(wait)

    def stop(self) -> None:
        """Let the requests in progress end without further attempts."""
        self.is_stopping = True

    async def _post(self, body: Mapping[str, Any]) -> bytes:
        """Send a request once and return the content of its answer."""
        content = bytearray()
        try:
            # The total duration is limited here; the library's limits are for single reads.
            async with (
                asyncio.timeout(self._config.timeout),
                self._http.stream("POST", self._url, content=json.dumps(body)) as response,
            ):
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        raise _Failed(f"an answer of over {MAX_ANSWER_BYTES:,} bytes", sent=True)
        except (TimeoutError, httpx2.TimeoutException) as error:
            sent = not isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout)
            raise _Failed(f"no answer in {self._config.timeout:g} seconds", sent=sent) from None
        except httpx2.ConnectError as error:
            raise _Failed(f"cannot connect ({_one_line(error)})", sent=False) from None
        except httpx2.HTTPError as error:
            reason = _one_line(error) or type(error).__name__
            raise _Failed(f"the connection broke ({reason})", sent=True) from None
        status = response.status_code
        if status == 200:
            return bytes(content)
        shown = f"status {status}{_explanation(bytes(content))}"
        if status in _RETRIED or status >= 500:
            # An overloaded or broken endpoint does not charge its errors.
            wait = retry_after(response.headers.get("retry-after"), time.time())
            raise _Failed(shown, sent=False, retry_after=wait)
        raise UserError(self._redacted(f"{self._where}: {shown}; {_advice(status)}"))

    def _redacted(self, message: str) -> str:
        return message.replace(self._key, "[key]") if self._key else message


def waiting_time(attempt: int, demanded: float, chance: float) -> float:
    """Return the seconds to wait after an attempt: exponential backoff with jitter.

    Args:
        attempt: number of attempts so far, from 1.
        demanded: seconds that the endpoint asks to wait for; 0 if it does not.
        chance: random number in [0, 1); the wait is between half and all of the backoff.
    """
    backoff = min(_FIRST_WAIT * 2 ** min(attempt - 1, 20), _MAX_WAIT) * (1 + chance) / 2
    return max(backoff, min(demanded, _MAX_RETRY_AFTER))


def retry_after(header: str | None, now: float) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 if it is neither.

    Args:
        header: value of the header.
        now: the current time in seconds since 1970.
    """
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER) if seconds == seconds else 0.0


def _parse(content: bytes) -> ChatAnswer:
    """Return the answer in a response with status 200."""
    try:
        answer = parse_json(content)
    except ValueError as error:
        reason = f"an answer that is not JSON ({error}): {_start(content)}"
        raise _Failed(reason, sent=True) from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise _Failed(f"an answer without choices: {_start(content)}", sent=True)
    tokens = _tokens(answer.get("usage"))
    if not choices:
        return ChatAnswer(text=None, stopped=False, tokens=tokens, problem="no choices")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _Failed(f"an answer without a message: {_start(content)}", sent=True)
    text, reason = message.get("content"), choice.get("finish_reason")
    if not isinstance(text, str):
        problem = "no content" if text is None else "content that is not text"
        return ChatAnswer(text=None, stopped=False, tokens=tokens, problem=problem)
    return ChatAnswer(text=text, stopped=reason == "stop", tokens=tokens)


def _tokens(usage: Any) -> int | None:
    """Return the tokens of prompt and answer; None if the endpoint does not say."""
    if not isinstance(usage, dict):
        return None
    parts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    total = sum(part for part in parts if type(part) is int)
    valid = all(type(part) is int and part >= 0 for part in parts)
    return min(total, _MAX_TOKENS) if valid else None


def _explanation(content: bytes) -> str:
    """Return what an error response says, to follow its status."""
    try:
        answer = parse_json(content)
    except ValueError:
        return ""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return f" ({truncated_repr(message, _SHOWN)})" if isinstance(message, str) else ""


def _advice(status: int) -> str:
    if status in (401, 403):
        return "check the key in the environment variable that api_key_env names"
    if 300 <= status < 400:
        return "redirects are not followed: set base_url to the final address"
    if status == 404:
        return "check base_url and model"
    return "check model, max_tokens and extra_body"


def _start(content: bytes) -> str:
    return truncated_repr(content[:_SHOWN].decode("utf-8", "replace"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN]
