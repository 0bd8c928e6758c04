"""Chat templates rendered in a process with limits, since a template is a program from others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.core.json import parse_json
from sdjax.io.chat_worker import MAX_REPLY

MAX_SECONDS = 5  # of processor time, per template

_BOOT = "import sys; sys.path[:0] = {paths!r}; from sdjax.io.chat_worker import main; main()"
# Credentials and settings of the user's stay here.
_GRACE_SECONDS = 1
_INHERITED = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TZ")


class ChatRenderer:
    """Renders templates as transformers does. Thread-safe.

    The process is started by the first template and ends with this object.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tokens: Mapping[str, Any],
    ) -> str:
        """Render a conversation.

        Args:
            template: the Jinja template.
            messages: JSON-compatible messages, such as dicts with `role` and `content`.
            add_generation_prompt: whether to append the beginning of the model's answer.
            tokens: the special tokens, by name.

        Raises:
            ValueError: the template is invalid or rejects the messages, or takes too much time or
                memory; the message is one line.
        """
        request = {
            "template": template,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tokens": tokens,
            "max_seconds": MAX_SECONDS,
        }
        with self._lock:
            # Rows of datasets may have dates and the like in further fields.
            reply = self._answer(json.dumps(request, default=str).encode() + b"\n")
        if not isinstance(reply, dict) or not isinstance(reply.get("text"), str):
            raise ValueError(str(reply["error"]) if isinstance(reply, dict) else "no text")
        return str(reply["text"])

    def _answer(self, request: bytes) -> Any:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline(MAX_REPLY)
        except BrokenPipeError:
            line = b""
        except BaseException:  # Ctrl-C between request and reply
            self._stop(process)
            raise
        if line.endswith(b"\n"):
            return parse_json(line)
        self._stop(process)
        if process.returncode == -signal.SIGXCPU:
            raise ValueError(f"it takes more than {MAX_SECONDS} s of processor time")
        raise ValueError("it crashes, or needs too much memory")

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).resolve().parents[2])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT.format(paths=paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _INHERITED if name in os.environ},
            cwd="/",
            start_new_session=True,  # the parent handles Ctrl-C
        )
        weakref.finalize(self, _end, self._process)
        return self._process

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that has ended or is waiting or working."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # of a request that was not read
            pipe.close()
    try:
        process.wait(_GRACE_SECONDS)  # it may be ending by itself, which says why
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


RENDERER = ChatRenderer()  # of all tokenizers, since a process takes half a second to start
