"""Prompts with memory: their format, sources of any content, and errors."""

import pytest

from sdjax.core.errors import UserError
from sdjax.programs.extraction import extract_source
from sdjax.programs.memory_prompts import (
    OPERATIONS,
    EarlierProgram,
    MemoryPrompt,
    PromptMemory,
    RefusedProgram,
)
from sdjax.programs.prompts import find_prompt

SLOTS = ("expert_1", "expert_2", "expert_3")
DESCRIPTIONS = dict.fromkeys(SLOTS, "adds")
WORSE, BETTER = (
    f"def merge_models(task_vectors):\n    return {weight} * task_vectors['expert_1']\n"
    for weight in (0.1, 0.9)
)
MEMORY = PromptMemory(
    programs=(
        EarlierProgram(source=WORSE, score=61.5, change=0.25),
        EarlierProgram(source=BETTER, score=72.04, change=1.5, families=("norm balance", "clip")),
    ),
    operation="combine",
)


def test_short_prompt_with_memory_extends_the_short_prompt():
    prompt, plain = find_prompt("short-memory"), find_prompt("short")
    for slots in (SLOTS, SLOTS[:2]):
        expected = plain.render(slots=slots, descriptions={})
        assert prompt.render(slots=slots, descriptions={}) == expected
    text = prompt.render(slots=SLOTS, descriptions={}, memory=MEMORY)
    assert text == f"# 62%\n{WORSE}# 72%\n{BETTER}# merge three experts: combine"


def test_full_prompt_with_memory_shows_programs_in_place_of_the_example():
    prompt = find_prompt("full-memory")
    plain = prompt.render(slots=SLOTS, descriptions=DESCRIPTIONS)
    assert "An example" in plain
    assert "Program 1" not in plain
    text = prompt.render(slots=SLOTS, descriptions=DESCRIPTIONS, memory=MEMORY)
    assert "An example" not in text
    assert "Program 1: score 61.5 %, change 0.25.\n" in text
    assert "Program 2: score 72.0 %, change 1.5; uses norm balance, clip.\n" in text
    assert f"```python\n{BETTER}```" in text
    assert extract_source(text) == BETTER
    requests = {
        prompt.render(
            slots=SLOTS,
            descriptions=DESCRIPTIONS,
            memory=PromptMemory(programs=MEMORY.programs, operation=operation),
        )
        for operation in (*OPERATIONS, None)
    }
    assert len(requests) == len(OPERATIONS) + 1
    refused = RefusedProgram(source="def merge_models(", status="bad syntax", message="line 1")
    text = prompt.render(
        slots=SLOTS, descriptions=DESCRIPTIONS, memory=PromptMemory(refused=(refused,))
    )
    assert "refused (bad syntax: line 1)" in text
    assert "```python\ndef merge_models(\n```" in text


@pytest.mark.parametrize(
    "line",
    [
        "{{ 7 * 7 }} {% for %} {# x",
        "```",
        "````\n    ```python",
        '"""\n~~~\n``````',
        "$names $$ {names}",
        "\u202e \x00 </s>",
    ],
)
def test_any_source_is_text_of_the_prompt(line):
    source = f"def merge_models(task_vectors):\n    '''\n{line}\n    '''\n    return 0\n"
    memory = PromptMemory(
        programs=(EarlierProgram(source=WORSE, score=1.0), EarlierProgram(source=source, score=50)),
        operation="improve",
    )
    full = find_prompt("full-memory")
    text = full.render(slots=SLOTS, descriptions=DESCRIPTIONS, memory=memory)
    assert source in text
    assert extract_source(text) == source
    assert text.count("Improve the best program") == 1
    short = find_prompt("short-memory").render(slots=SLOTS, descriptions={}, memory=memory)
    assert short == f"# 1%\n{WORSE}# 50%\n{source}# merge three experts: improve"


def test_template_may_be_a_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ count }}: {{ names }}{% for one in programs %} {{ one.source | fenced }}{% endfor %}\n"
    )
    prompt = find_prompt(str(path))
    assert prompt.render(slots=SLOTS[:1], descriptions={}) == 'one: "expert_1"'
    text = prompt.render(
        slots=SLOTS[:1],
        descriptions={},
        memory=PromptMemory(programs=(EarlierProgram(source="\npass\n", score=1.0),)),
        chat=lambda message: f"<user>{message}\n",
    )
    assert text == '<user>one: "expert_1" ```python\npass\n```\n'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "mine, line 2: not a valid Jinja template"),
        ("{{ program }}", "unknown variable 'program'; did you mean programs"),
        ("{% for n in range(10) %}x{% endfor %}", "unknown variable 'range'"),
        ("x{% for one in programs %}{{ one.name }}{% endfor %}", "not a valid.*'name'"),
        ("x {{ programs.__class__.__mro__ }}", "not a valid.*unsafe"),
        ("x {{ programs.append(1) }}", "not a valid.*unsafe"),
        ("x {% include 'a' %}", "not a valid"),
        ("{{ operation or '' }}", "mine: is empty; write"),
        (
            "x{% if operation == 'explore' %}{{ programs[1].source }}{% endif %}",
            r"element 1\) with 1 earlier program to explore; correct",
        ),
        ("x{% if programs %}{{ refused[0].source }}{% endif %}", "with 1 earlier program to"),
        ("x{% if refused %}{{ programs[0].source }}{% endif %}", "with 1 refused program"),
        ("x{% for one in programs %}{{ 1 / one.score }}{% endfor %}", "zero.* with 1 earlier"),
        ("x{% for one in programs %}{{ one.families[0] }}{% endfor %}", "with 1 earlier program"),
        ("{{ names if programs | length < 2 }}", "is empty with 2 earlier programs to improve"),
        ("{{ '%s' % 1 }}", "operator % is not allowed"),
        ("{{ names * 1000000000 }}", r"operator \* is not allowed"),
        ("{{ names | center(1000000000) }}", "No filter named 'center'"),
    ],
)
def test_error_says_what_is_wrong_with_a_template(template, message):
    with pytest.raises(UserError, match=message):
        MemoryPrompt(name="mine", text=template)


def test_listed_expert_needs_a_description():
    prompt = MemoryPrompt(name="mine", text="{% for one in experts %}{{ one.name }}{% endfor %}")
    with pytest.raises(UserError, match="expert_2 has no description"):
        prompt.render(slots=SLOTS, descriptions={"expert_1": "adds"})
