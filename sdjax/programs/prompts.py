"""The prompts from which a generator writes merge programs: versioned files in prompts/.

`short` is one comment line for generators that were trained on programs (the zoo). It ends without
a newline: a trailing one would split the "newline and indent" tokens of a byte-level BPE, and a
small model then writes nothing sensible. `full` describes the algorithm API and the experts and
gives one worked example, for instruction-tuned generators.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Template

from sdjax.core.errors import UserError

FOLDER = Path(__file__).parent / "prompts"
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def names() -> tuple[str, ...]:
    """The prompts there are."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


@cache
def _template(name: str) -> Template:
    if name not in names():
        raise UserError(f'prompt "{name}" does not exist: use one of {", ".join(names())}')
    return Template((FOLDER / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n"))


def render(
    name: str,
    *,
    slots: Sequence[str],
    descriptions: Mapping[str, str],
    chat: Callable[[str], str] | None = None,
) -> str:
    """The prompt `name` for these experts, without a trailing newline unless `chat` adds one.

    slots: the experts' names in slot order ("expert_1", ...); descriptions: what each is good at,
    by slot, used by prompts that list the experts; chat: turns the user's message into the
    generator's chat format (its tokenizer's template, with the opening of the answer).
    Raises UserError for an unknown prompt and for an expert without a description.
    """
    template = _template(name)
    wanted = template.get_identifiers()
    values = {
        "count": _COUNTS[len(slots)] if len(slots) < len(_COUNTS) else str(len(slots)),
        "names": ", ".join(f'"{slot}"' for slot in slots),
    }
    if "experts" in wanted:
        missing = [slot for slot in slots if not descriptions.get(slot, "").strip()]
        if missing:
            raise UserError(
                f'prompt "{name}" lists the experts, but {missing[0]} has no description: add one'
            )
        lines = (f"- {slot}: {' '.join(descriptions[slot].split())}" for slot in slots)
        values["experts"] = "\n".join(lines)
    text = template.substitute(values)
    return chat(text) if chat is not None else text
