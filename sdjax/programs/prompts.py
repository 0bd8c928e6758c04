"""Prompts for generators of merge programs: the text files in prompts/.

`short` is a single comment line, for generators that were trained on programs (the zoo). It has no
trailing newline, because that would split the "newline and indent" tokens of a byte-level BPE and
make a small model write nonsense. `full` describes the algorithm API and the experts and contains a
worked example, for instruction-tuned generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Template

from sdjax.core.errors import UserError

FOLDER = Path(__file__).parent / "prompts"
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def names() -> tuple[str, ...]:
    """Return the names of the prompts."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


@cache
def _template(name: str) -> Template:
    if name not in names():
        raise UserError(f'unknown prompt "{name}"; use one of {", ".join(names())}')
    return Template((FOLDER / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n"))


def render(
    name: str,
    *,
    slots: Sequence[str],
    descriptions: Mapping[str, str],
    chat: Callable[[str], str] | None = None,
) -> str:
    """Return a prompt, without a trailing newline unless `chat` adds one.

    Args:
        name: name of the prompt.
        slots: names of the experts in slot order.
        descriptions: mapping from slot to description, for prompts that list the experts.
        chat: function that wraps a user message in the generator's chat template.

    Raises:
        UserError: an unknown prompt, or an expert without a description.
    """
    template = _template(name)
    identifiers = template.get_identifiers()
    values = {
        "count": _COUNTS[len(slots)] if len(slots) < len(_COUNTS) else str(len(slots)),
        "names": ", ".join(f'"{slot}"' for slot in slots),
    }
    if "experts" in identifiers:
        missing = [slot for slot in slots if not descriptions.get(slot, "").strip()]
        if missing:
            raise UserError(
                f'prompt "{name}" lists the experts, but {missing[0]} has no description; '
                f"add experts.{missing[0]}.description"
            )
        lines = (f"- {slot}: {' '.join(descriptions[slot].split())}" for slot in slots)
        values["experts"] = "\n".join(lines)
    text = template.substitute(values)
    return chat(text) if chat is not None else text
