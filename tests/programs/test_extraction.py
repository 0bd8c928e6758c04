"""Extraction of source code from fenced, bare and unfinished generations."""

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


def test_prose_with_from_is_not_source():
    text = "from my point of view this is hard\n" + PROGRAM
    assert extract_source(text) == PROGRAM
