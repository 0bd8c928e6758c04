"""Parity of the built-in chat templates with those of mergekit 0.1.5.

`mergekit/make_references.py` generated the conversations and their rendered text.
"""

import json
from pathlib import Path

import pytest
from jinja2 import Environment, TemplateRuntimeError

from sdjax.merging.recipe.chat_templates import CHAT_TEMPLATES

FILE = Path(__file__).parent / "mergekit" / "references" / "chat_templates.json"


def render(name, messages, add_generation_prompt):
    def raise_exception(message):
        raise TemplateRuntimeError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(CHAT_TEMPLATES[name]).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )


def test_conversations_render_as_in_mergekit():
    references = json.loads(FILE.read_text())
    assert {one["name"] for one in references} == CHAT_TEMPLATES.keys()
    for one in references:
        got = render(one["name"], one["messages"], one["add_generation_prompt"])
        assert got == one["text"], one


def test_mistral_rejects_roles_that_do_not_alternate():
    question = {"role": "user", "content": "hi"}
    with pytest.raises(TemplateRuntimeError, match="turns must alternate"):
        render("mistral", [question, question], False)
