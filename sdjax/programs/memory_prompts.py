"""Prompts with memory: Jinja templates that show the generator what was found before.

A template reads these variables:

names       the quoted names of the experts, with commas
count       the number of experts, in words
experts     list of experts, each with `name` and `description`
operation   what the generator is asked to do with the programs, or None if there are none
programs    list of earlier programs, best last; see `EarlierProgram`
refused     list of refused programs; see `RefusedProgram`

The filter `fenced` makes a Markdown code block of a source, and `round` an integer or, with a
number of digits, a decimal. A template runs in Jinja's sandbox with the filters in `FILTERS`: it
reads these variables and nothing else, and a source is only ever a value, so that Jinja syntax
within a source is text. Neither time nor memory is limited, so that a template is as trusted as a
config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sdjax.core.errors import UserError, did_you_mean, truncated_repr

SUFFIX = ".jinja"
VARIABLES = ("count", "experts", "names", "operation", "programs", "refused")
Operation = Literal["improve", "combine", "simplify", "explore"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_SHARED_FILTERS = (
    *("capitalize", "default", "first", "join", "last", "length", "lower", "replace", "reverse"),
    *("trim", "upper"),
)
COMBINE: Operation = "combine"  # the only one that needs two programs
FILTERS = ("fenced", "round", *_SHARED_FILTERS)
_MIN_FENCE = 3
_MAX_CHARACTERS = 1 << 20  # of a rendered prompt, far beyond any context


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlierProgram:
    """A scored program in a prompt.

    Attributes:
        source: its source code.
        score: its score in percent.
        change: norm of its merged task vector, relative to the mean norm of the experts'.
        families: the families of its operations, in words.
    """

    source: str
    score: float
    change: float = 0.0
    families: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusedProgram:
    """A refused program in a prompt.

    Attributes:
        source: its source code.
        status: the sandbox's verdict, such as "bad syntax".
        message: reason for the verdict, in one line.
    """

    source: str
    status: str
    message: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptMemory:
    """What a prompt shows of earlier iterations.

    Attributes:
        programs: earlier programs, best last.
        refused: refused programs.
        operation: what is asked for, one of `OPERATIONS`; None without programs.
    """

    programs: tuple[EarlierProgram, ...] = ()
    refused: tuple[RefusedProgram, ...] = ()
    operation: str | None = None


NO_MEMORY = PromptMemory()
# Examples that have as little as possible, or everything, but in sources of a few tokens.
_PROGRAMS = (
    EarlierProgram(source="pass", score=0.0),
    EarlierProgram(source="pass", score=55.5, change=0.55, families=("norm balance",) * 3),
)
_REFUSED = (
    RefusedProgram(source="pass", status="bad syntax"),
    RefusedProgram(source="pass", status="bad syntax", message="line 5: invalid syntax"),
)


def example_memories(
    programs: int, refused: int, operations: Sequence[str] = OPERATIONS
) -> Iterator[PromptMemory]:
    """Yield examples of all that a prompt may have to show, which differ in length and operation.

    Args:
        programs: maximum number of earlier programs.
        refused: maximum number of refused programs.
        operations: the operations that a prompt may ask for.
    """
    for count in range(programs + 1):
        possible: list[str | None] = [
            name for name in operations if count and (name != COMBINE or count > 1)
        ]
        for refusals in range(refused + 1):
            for program, refusal in zip(_PROGRAMS, _REFUSED, strict=True):
                for operation in possible or [None]:
                    yield PromptMemory(
                        programs=(program,) * count,
                        refused=(refusal,) * refusals,
                        operation=operation,
                    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPrompt:
    """A prompt that is a Jinja template.

    Attributes:
        name: name of a shipped prompt, or path of a file.
        text: the template.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        """Check the template, and that it renders whatever there is to show."""
        try:
            unknown = self.variables
        except (jinja2.TemplateError, RecursionError) as error:
            raise self._error(error) from None
        for variable in sorted(unknown - {*VARIABLES, *_environment().globals}):
            allowed = f"allowed: {', '.join(VARIABLES)}"
            raise UserError(
                f"prompt {self.name}: unknown variable {truncated_repr(variable)}; "
                f"{did_you_mean(variable, VARIABLES, allowed)}"
            )
        for memory in example_memories(2, 1):
            self._render(("expert_1",), {"expert_1": "an expert"}, memory)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads."""
        return frozenset(meta.find_undeclared_variables(_environment().parse(self.text)))

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
            memory: what was found before.

        Raises:
            UserError: an expert without a description, or a template that fails or renders to an
                empty text.
        """
        if "experts" in self.variables:
            check_descriptions(self.name, slots, descriptions)
        text = self._render(slots, descriptions, memory)
        return chat(text) if chat is not None else text

    def _render(
        self, slots: Sequence[str], descriptions: Mapping[str, str], memory: PromptMemory
    ) -> str:
        try:
            text = self._template.render(
                names=quoted_names(slots),
                count=count_in_words(slots),
                experts=[
                    {"name": slot, "description": " ".join(descriptions.get(slot, "").split())}
                    for slot in slots
                ],
                operation=memory.operation,
                programs=[_shown(program) for program in memory.programs],
                refused=[_shown(program) for program in memory.refused],
            ).rstrip("\n")
        except Exception as error:  # a template is a program, which may raise anything
            raise self._error(error, memory) from None
        if not text.strip():
            raise UserError(
                f"prompt {self.name}: is empty{_described(memory)}; write the text of the prompt"
            )
        if len(text) > _MAX_CHARACTERS:
            raise UserError(
                f"prompt {self.name}: has more than {_MAX_CHARACTERS:,} characters; shorten it"
            )
        return text

    @cached_property
    def _template(self) -> jinja2.Template:
        return _environment().from_string(self.text)

    def _error(self, error: Exception, memory: PromptMemory = NO_MEMORY) -> UserError:
        line = getattr(error, "lineno", None)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(
            f"prompt {self.name}{f', line {line}' if line else ''}: not a valid Jinja template "
            f"({reason}){_described(memory)}; correct it, the variables are {', '.join(VARIABLES)}"
        )


def quoted_names(slots: Sequence[str]) -> str:
    """Return the quoted names of the experts, with commas."""
    return ", ".join(f'"{slot}"' for slot in slots)


def count_in_words(slots: Sequence[str]) -> str:
    """Return the number of experts, in words if it is below ten."""
    return _COUNTS[len(slots)] if len(slots) < len(_COUNTS) else str(len(slots))


_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def check_descriptions(name: str, slots: Sequence[str], descriptions: Mapping[str, str]) -> None:
    """Raise UserError if the prompt of this name lists an expert without a description."""
    for slot in slots:
        if not descriptions.get(slot, "").strip():
            raise UserError(
                f"prompt {name}: lists the experts, but {slot} has no description; "
                f"add experts.{slot}.description"
            )


def fenced(source: str) -> str:
    """Return a Python code block of Markdown, whose fence no line of the source can close."""
    longest = max(map(len, re.findall("`+", source)), default=0)
    fence = "`" * max(_MIN_FENCE, longest + 1)
    return f"{fence}python\n{source}\n{fence}"


def _shown(program: EarlierProgram | RefusedProgram) -> dict[str, Any]:
    """Return the attributes of a program for a template, without outer blank lines."""
    return dataclasses.asdict(program) | {"source": program.source.strip("\n")}


def _described(memory: PromptMemory) -> str:
    """Return what a prompt has to show, to follow what is wrong with it; empty if nothing."""
    parts = []
    if count := len(memory.programs):
        asked = f" to {memory.operation}" if memory.operation else ""
        parts.append(f"{count} earlier program{'' if count == 1 else 's'}{asked}")
    if count := len(memory.refused):
        parts.append(f"{count} refused program{'' if count == 1 else 's'}")
    return f" with {' and '.join(parts)}" if parts else ""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without what makes long texts or large numbers, which no prompt needs."""

    intercepted_binops = frozenset({"*", "**", "<<", "%"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        raise jinja2.TemplateRuntimeError(f"the operator {operator} is not allowed")


def _rounded(number: float, digits: int = 0) -> float | int:
    """Return a number rounded to some digits; an integer without digits."""
    return round(number, digits) if digits else round(number)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.globals.clear()
    shared = {name: environment.filters[name] for name in _SHARED_FILTERS}
    environment.filters = shared | {"fenced": fenced, "round": _rounded}
    return environment
