"""Renderer of chat templates in a process of its own, started by `sdjax.io.chat_template`.

A template is a program written by the author of the model. transformers runs it in Jinja's sandbox,
which limits what it can reach but neither time nor memory.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys

MAX_MEMORY = 2**30  # bytes of address space
MAX_CHARACTERS = 4_000_000  # of a result
MAX_REPLY = 12 * MAX_CHARACTERS + 1_000  # bytes, in JSON's escapes


def main() -> None:
    """Answer each line of JSON on stdin with one on stdout: its `text`, or an `error`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints is taken for a reply
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # The kernel ends the process then, also within one long operation.
        request = json.loads(line)
        seconds = math.ceil(usage.ru_utime + usage.ru_stime) + request["max_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            texts = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=request["add_generation_prompt"],
                **request["tokens"],
            )[0]
            if len(texts[0]) > MAX_CHARACTERS:
                raise ValueError(f"a text of more than {MAX_CHARACTERS:,} characters")
            reply = {"text": str(texts[0])}
        except Exception as error:  # a template is a program, which may raise anything
            text = str(error) or type(error).__name__
            reply = {"error": " ".join(text[:1_000].split())[:300]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
