"""Extraction of source code from fenced, bare and unfinished generations."""

import textwrap

import pytest

from sdjax.programs.extraction import extract_source

PROGRAM = "import jax.numpy as jnp\n\ndef merge_models(task_vectors):\n    return 1.0\n"


@pytest.mark.parametrize(
    "text",
    [
        PROGRAM,
        f"```python\n{PROGRAM}```",
        f"```\n{PROGRAM}```\nThat is all.",
        f"~~~py\n{PROGRAM}~~~",
        f"First, the reasoning.\n\n```python\n{PROGRAM}```\n",
        f"```python\ndef old(): pass\n```\nBetter:\n```python\n{PROGRAM}```",
        f"Let us see.\n{PROGRAM}",
        f"```python\n{PROGRAM}",  # cut off before the fence was closed
        f"```python\n{PROGRAM}```\n\n```bash\npython merge.py\n```",
        PROGRAM.replace("\n", "\r\n"),
        PROGRAM + "\n\n   \n",
        PROGRAM.replace("1.0", "1.0   "),
    ],
)
def test_source_is_found(text):
    assert extract_source(text) == PROGRAM


@pytest.mark.parametrize("start", ["from math import pi\n", "@jax.jit\n", "def f(x):\n"])
def test_bare_source_starts_at_its_first_line(start):
    assert extract_source("Sure:\n" + start + "    pass\n") == start + "    pass\n"


@pytest.mark.parametrize(
    "text",
    ["", "  \n", "I cannot write that.", "```python\n\n```", "definitely imported from elsewhere"],
)
def test_text_without_source(text):
    assert extract_source(text) is None


DOCUMENTED = '''import jax.numpy as jnp

def merge_models(task_vectors):
    """Halve.

    ```python
    merge_models({})
    ```

    ~~~
    0.5
    ~~~
    """
    return 1.0
'''


@pytest.mark.parametrize(
    "text",
    [
        DOCUMENTED,
        f"```python\n{DOCUMENTED}```",
        f"````\n{DOCUMENTED}````\nDone.",
        f"~~~python\n{DOCUMENTED}~~~~\n",
        f"1. Here:\n\n   ```python\n{textwrap.indent(DOCUMENTED, '   ')}   ```",
        f"Sure:\n{DOCUMENTED}",
    ],
)
def test_fences_inside_the_source_do_not_end_it(text):
    assert extract_source(text) == DOCUMENTED


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{PROGRAM}```\nUse it:\n```python\nprint(merge_models(vectors))\n```",
        f"The idea:\n```\nsum(w * t)\n```\n{PROGRAM}",
        f"````markdown\n```python\ndef merge_models(x): pass\n```\n````\n```python\n{PROGRAM}```",
    ],
)
def test_block_that_defines_a_merge_function_is_preferred(text):
    assert extract_source(text) == PROGRAM


BARE = "def merge_models(task_vectors):\n    return 0\n"
QUOTING = "def merge_models(task_vectors):\n    '''\n```\n0.5\n```\n    '''\n    return 0\n"


@pytest.mark.parametrize("source", [BARE, DOCUMENTED, QUOTING])
@pytest.mark.parametrize(
    "text",
    [
        "{}```python\nprint(merge_models(vectors))\n```",
        "{}\n```\nprint(1)\n```\nThat is all.\n",
        "```python\nimport jax\n```\nThe function:\n{}",
        "```python\nimport jax\n```\nThe function:\n{}\n~~~text\n0.5\n~~~",
        "```text\n{}```\nThat is all.",
        "Use `x`:\n```bash\npip install jax\n```\n{}```bash\npython merge.py\n```",
    ],
)
def test_bare_function_ends_where_a_block_starts(source, text):
    assert extract_source(text.format(source)) == source


def test_last_block_is_the_source_if_none_defines_a_merge_function():
    text = "import this first:\n```python\ndef f(): pass\n```\n```\ndef g(): pass\n```"
    assert extract_source(text) == "def g(): pass\n"


def test_prose_with_from_is_not_source():
    text = "from my point of view this is hard\n" + PROGRAM
    assert extract_source(text) == PROGRAM
