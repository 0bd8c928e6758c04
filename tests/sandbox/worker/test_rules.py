"""Text rules: honest programs pass, and messages say what to write instead."""

import pytest
from honest import ADMITTED, REFUSED, source

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.rules import check_text
from sdjax.sandbox.worker.trace import trace_trusted

HEAD = "import functools\nimport jax\nimport jax.numpy as jnp\nimport numpy as np\n"


@pytest.mark.parametrize("name", ADMITTED)
def test_honest_programs_are_admitted(name, signature):
    verify_ir(trace_trusted(source(*ADMITTED[name]), signature), signature)


@pytest.mark.parametrize("name", REFUSED)
def test_messages_say_what_to_write_instead(name, signature):
    *program, expected = REFUSED[name]
    with pytest.raises(Refusal) as refused:
        trace_trusted(source(*program), signature)
    assert expected in refused.value.message


def refusal(head, body="pass"):
    """Return the rule that refuses a program; an empty text if it passes."""
    text = HEAD + source(head + "\n", f"{body}\nreturn task_vectors['expert_1']", "task_vectors")
    try:
        check_text(text, 1 << 15)
    except Refusal as refused:
        return refused.rule
    return ""


@pytest.mark.parametrize(
    ("head", "body", "rule"),
    [
        ("j = jax", "j.devices()", "attribute"),
        ("", "j = jax; k = j; k.devices()", "attribute"),
        ("", "k = j; j = jax; k.devices()", "attribute"),
        ("", "(j := jax).devices()", "attribute"),
        ("", "[(j := jax) for _ in '1']; j.devices()", "module"),
        ("", "(lambda j: j.devices())(jax)", "module"),
        ("def f(j=jax): return j.devices()", "f()", "module"),
        ("", "for j in (jax,): j.devices()", "module"),
        ("", "[j.devices() for j in [jax]]", "module"),
        ("class K: j = jax", "K.j.devices()", "module"),
        ("def f():\n    global j\n    j = jax", "f(); j.devices()", "module"),
        ("def f(x: jax): return x", "", "module"),
        ("class K:\n    x = jax.devices()", "pass", "attribute"),
        ("@jax.devices\ndef f(): pass", "pass", "attribute"),
        ("", "(lambda x=jax.devices(): x)()", "attribute"),
        ("", "f'{1:{jax.devices()}}'", "attribute"),
        ("", "getattr(jax, 'devices')()", "attribute"),
        ("", "list(map(getattr, [1], ['real']))", "name"),
        ("", "jax.ｄevices()", "attribute"),
        ("def f():\n    import jax as j\n    return j.devices()", "f()", "attribute"),
        ("def f(np): return np.shape", "np.load('x')", "attribute"),
        ("def f():\n    from jax import numpy as xp\n    return np.load('x')", "f()", "attribute"),
        ("class K:\n    np = 1\n    def f(self): return np.load('x')", "K().f()", "attribute"),
        ("import dataclasses", "dataclasses.types.CodeType", "attribute"),
        ("from dataclasses import types", "pass", "import"),
        ("import enum", "enum.bltns", "attribute"),
        ("", "functools.update_wrapper(refusal, HEAD, assigned=('__globals__',))", "attribute"),
        ("", "functools.wraps(HEAD, assigned=('__globals__',))", "attribute"),
        ("", "functools.wraps(HEAD, ('__globals__',))", "attribute"),
        ("", "'{0.__class__}'.format(1)", "attribute"),
        ("", "'{:{0.x}}'.format(1)", "attribute"),
        ("", "f = str.format; f('{0.x}', 1)", "attribute"),
        ("class K:\n    def __class_getitem__(cls, x): return x", "K[0]", "dunder"),
        ("class K:\n    def __getattr__(self, x): return x", "K().x", "dunder"),
        ("def __init__(self): pass", "pass", "dunder"),
        ("", "match 1:\n    case object(__class__=k): pass", "dunder"),
        ("", "(__builtins__ := 1)", "dunder"),
        ("", "object().__init__()", "private-attribute"),
        ("", "jax.__name__", "private-attribute"),
        ("async def f(): pass", "pass", "statement"),
        ("if __name__ == '__main__':\n    pass\nelse:\n    import os", "pass", "import"),
    ],
)
def test_ways_around_the_rules(head, body, rule):
    assert refusal(head, body) == rule


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("def f(jax): return jax.devices", "pass"),
        ("", "np = 1; np.load"),
        ("def f():\n    for np in (): np.load", "pass"),
        ("", "[np.load for np in ()]"),
        ("", "{np: np.load for np in ()}"),
        ("", "(lambda np: np.load)"),
        ("def f():\n    try: pass\n    except ValueError as np: np.load", "pass"),
        ("def f(x):\n    match x:\n        case {'a': 1, **np}: np.load", "pass"),
        ("def f():\n    def np(): pass\n    np.load", "pass"),
        ("class K:\n    np = 1\n    x = np.load", "pass"),
        ("def f():\n    np = 1\n    def g(): return np.load", "pass"),
    ],
)
def test_local_names_may_be_those_of_modules(head, body):
    assert refusal(head, body) == ""
