"""Prompts for generators of merge programs: the files in prompts/, and files of the user.

`short` is a single comment line, for generators that were trained on programs (the zoo). It has no
trailing newline, because that would split the "newline and indent" tokens of a byte-level BPE and
make a small model write nonsense. `full` describes the algorithm API and the experts and contains a
worked example, for instruction-tuned generators. `short-memory` and `full-memory` also show earlier
programs. They are Jinja templates (`sdjax.programs.memory_prompts`), as is any file of the user
whose name ends in .jinja.

Any other prompt is text with placeholders:

$count      the number of experts, in words
$names      the quoted names of the experts, with commas
$experts    one line per expert, "- NAME: DESCRIPTION"

`$$` is a dollar sign, and so is a `$` that is not followed by a name. All else is text.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from string import Template

from sdjax.core.errors import UserError, did_you_mean, truncated_repr
from sdjax.core.files import read_text
from sdjax.programs.memory_prompts import (
    NO_MEMORY,
    SUFFIX,
    MemoryPrompt,
    PromptMemory,
    check_descriptions,
    count_in_words,
    quoted_names,
)

FOLDER = Path(__file__).parent / "prompts"
PLACEHOLDERS = ("count", "names", "experts")
_MAX_BYTES = 1 << 20  # far beyond any context; a larger file is a mistake


def names() -> tuple[str, ...]:
    """Return the names of the shipped prompts."""
    return tuple(sorted(_shipped()))


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in FOLDER.iterdir() if path.suffix in (".txt", SUFFIX)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with placeholders, which is the same in every iteration.

    Attributes:
        name: name of a shipped prompt, or path of a file.
        text: the text with placeholders, without trailing newlines.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise UserError(f"prompt {self.name}: is empty; write the text of the prompt")
        for identifier in Template(self.text).get_identifiers():
            if identifier not in PLACEHOLDERS:
                found = re.search(rf"\$\{{?{identifier}\b", self.text)
                line = self.text.count("\n", 0, found.start() if found else 0) + 1
                allowed = f"allowed: {', '.join(f'${name}' for name in PLACEHOLDERS)}"
                raise UserError(
                    f"prompt {self.name}, line {line}: unknown placeholder ${identifier}; "
                    f"{did_you_mean(identifier, PLACEHOLDERS, allowed)}; "
                    f"write $${identifier} for a dollar sign"
                )

    @cached_property
    def variables(self) -> frozenset[str]:
        """The placeholders in the text."""
        return frozenset(Template(self.text).get_identifiers())

    def render(
        self,
        *,
        slots: Sequence[str],
        descriptions: Mapping[str, str],
        chat: Callable[[str], str] | None = None,
        memory: PromptMemory = NO_MEMORY,
    ) -> str:
        """Return the text for the generator, without a trailing newline unless `chat` adds one.

        Args:
            slots: names of the experts in slot order.
            descriptions: mapping from slot to description, for prompts that list the experts.
            chat: function that wraps a user message in the generator's chat template.
            memory: what was found before, which this prompt has no place for.

        Raises:
            UserError: an expert without a description.
        """
        template = Template(self.text)
        values = {"count": count_in_words(slots), "names": quoted_names(slots)}
        if "experts" in self.variables:
            check_descriptions(self.name, slots, descriptions)
            lines = (f"- {slot}: {' '.join(descriptions[slot].split())}" for slot in slots)
            values["experts"] = "\n".join(lines)
        text = template.safe_substitute(values)
        return chat(text) if chat is not None else text


PromptTemplate = Prompt | MemoryPrompt


def parse_prompt(name: str, text: str) -> PromptTemplate:
    """Return the prompt of a file's name and text.

    Raises:
        UserError: the text is empty, not a valid template, or contains an unknown placeholder.
    """
    if name.endswith(SUFFIX):
        return MemoryPrompt(name=name, text=text)
    return Prompt(name=name, text=text)


def find_prompt(name: str, *, relative_to: Path | None = None) -> PromptTemplate:
    """Return a prompt by name.

    Args:
        name: name of a shipped prompt, or path of a UTF-8 text file; a Jinja template if it ends in
            .jinja.
        relative_to: folder that is searched before the working directory.

    Raises:
        UserError: there is no such prompt or file, the file is not text or empty, or it contains an
            unknown placeholder or is not a valid template.
    """
    if (shipped := _shipped().get(name)) is not None:
        kind = MemoryPrompt if shipped.suffix == SUFFIX else Prompt
        return kind(name=name, text=_read(shipped))
    path = Path(os.path.expanduser(name))
    paths = [path] if relative_to is None else [relative_to / path, path]
    existing = next((path for path in paths if os.path.isfile(path)), None)
    if existing is None:
        advice = f"pass a text file or one of {', '.join(names())}"
        raise UserError(
            f"prompt {truncated_repr(name)}: no such file, and not the name of a shipped prompt; "
            f"{did_you_mean(name, names(), advice)}"
        )
    return parse_prompt(name, _read(existing))


def _read(path: Path) -> str:
    text = read_text(path, _MAX_BYTES)
    return text.replace("\r\n", "\n").rstrip("\n")
