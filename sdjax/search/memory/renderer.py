"""The prompt of a run, rendered with what earlier iterations have found."""

from __future__ import annotations

import dataclasses

from sdjax.core.config import replace_keys
from sdjax.io.tokenizer import Tokenizer
from sdjax.programs.memory_prompts import (
    NO_MEMORY,
    PromptMemory,
    example_memories,
)
from sdjax.programs.prompts import PromptTemplate
from sdjax.search.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptRenderer:
    """The prompt of a run, before rendering, and what renders it.

    Attributes:
        config: the run's config.
        template: the prompt.
        tokenizer: the generator's tokenizer.
        max_tokens: tokens that a prompt may have.
    """

    config: RunConfig
    template: PromptTemplate
    tokenizer: Tokenizer
    max_tokens: int

    def with_template(self, template: PromptTemplate, max_tokens: int) -> PromptRenderer:
        """Return the renderer of another prompt; one without place for programs shows none."""
        config = self.config
        if "programs" not in template.variables:
            generation = dataclasses.replace(config.generation, memory=None)
            config = replace_keys(config, generation=generation)
        return dataclasses.replace(self, config=config, template=template, max_tokens=max_tokens)

    def message(self, memory: PromptMemory = NO_MEMORY) -> str:
        """Return the text of a prompt without chat template."""
        experts = self.config.experts
        return self.template.render(
            slots=self.config.slots,
            descriptions={slot: expert.description for slot, expert in experts.items()},
            memory=memory,
        )

    def length(self, message: str) -> int:
        """Return the number of tokens of a prompt."""
        return len(self.tokenizer.encode_prompt(self.tokenizer.as_prompt(message)))

    def is_text(self, source: str) -> bool:
        """Return whether a source is plain text, without special tokens such as the end token."""
        tokens = self.tokenizer.encode(source, add_special=False)
        decode = self.tokenizer.decode
        return decode(tokens, skip_special=True) == decode(tokens, skip_special=False)


def longest_prompt(renderer: PromptRenderer, program_tokens: int) -> int:
    """Return an upper bound of the tokens of a prompt with memory.

    Args:
        renderer: the prompt of the run.
        program_tokens: maximum number of tokens of a program.

    Raises:
        UserError: the prompt cannot show what it may have to show.
    """
    memory = renderer.config.generation.memory
    if memory is None:
        return renderer.length(renderer.message())
    # The few tokens of the examples' sources stand for the rest of what a prompt says about each.
    return max(
        renderer.length(renderer.message(shown))
        + (len(shown.programs) + len(shown.refused)) * program_tokens
        for shown in example_memories(memory.programs, memory.refused, memory.possible_operations)
    )
