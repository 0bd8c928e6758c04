"""Config section of prompts with memory: what a prompt shows of the programs found so far.

It is part of the run's config, `sdjax.search.config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, PositiveInt
from sdjax.programs.memory_prompts import COMBINE, OPERATIONS, Operation

Weight = Annotated[float, Field(ge=0, le=1e6)]  # with sums and products that are finite


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryConfig:
    """Config of prompts that show what earlier iterations have found.

    The prompt must be a Jinja template (see `generation.prompt`). In the first iteration it is
    rendered without programs.

    Attributes:
        programs: number of earlier programs in a prompt, the best one last.
        refused: number of refused programs with their verdict in a prompt, 0 or 1.
        parents: how the programs of a prompt are drawn. With "top", from the best `top` programs,
            better ones more often. With "islands", likewise from those of one island. With "puct",
            by turns among the `top` ones with the highest upper confidence bound: programs count by
            the best program that was written from them, and the longer a program has not been
            shown, the more it counts.
        top: number of programs that the prompts of an iteration draw from.
        islands: number of islands. Each has an equal share of the samples, and its prompts show its
            own programs only.
        migration: number of iterations after which the best program of each island joins the next
            island as well.
        exploration: weight of "puct" on programs that were rarely shown, the constant c of its
            formula; 0 always takes those with the best descendants.
        archive: whether parents are drawn from an archive of the best program of each kind, by its
            families of operations and the size of its change to the seed, so that one kind cannot
            fill the prompts.
        operations: relative frequencies of the operations that prompts ask for. "combine" needs two
            programs.
        samples_per_prompt: number of consecutive samples that share one prompt, so that they can be
            compared with each other.
    """

    programs: Annotated[int, Field(ge=1, le=20)] = 2
    refused: Annotated[int, Field(ge=0, le=1)] = 0
    parents: Literal["top", "islands", "puct"] = "top"
    top: PositiveInt = 10
    islands: Annotated[int, Field(ge=1, le=1_000)] = 4
    migration: PositiveInt = 2
    exploration: Weight = 1.0
    archive: bool = False
    operations: dict[Operation, Weight] = Field(
        default_factory=lambda: dict.fromkeys(OPERATIONS, 1.0)
    )
    samples_per_prompt: PositiveInt = 1

    @field_validator("parents", mode="before")
    @classmethod
    def _check_parents(cls, value: object) -> object:
        if value is None or value == "none":
            raise ValueError(
                "must be top, islands or puct; for prompts without earlier programs, set "
                "generation.memory to null"
            )
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> MemoryConfig:
        if self.top < self.programs:
            raise ValueError(f"top ({self.top}) must be at least programs ({self.programs})")
        if not any(name != COMBINE or self.programs > 1 for name in self.possible_operations):
            raise ValueError(
                f"operations must have a positive frequency, also without {COMBINE}, which needs "
                "two programs"
                if self.programs == 1
                else "operations must have a positive frequency"
            )
        return self

    @property
    def possible_operations(self) -> tuple[Operation, ...]:
        """The operations with a positive frequency."""
        return tuple(name for name, frequency in self.operations.items() if frequency)
