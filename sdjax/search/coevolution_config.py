"""Config section of co-evolution: whether the best merged model becomes the next base or generator.

It is part of the run's config, `sdjax.search.config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CoevolutionConfig:
    """Config of what the best merged model of an iteration may become.

    It must beat the present base on the confirmation problems; see `sdjax.search.promotion`.

    Attributes:
        base: it may become the base that the next programs are applied to. The controls may change
            their bases by the same rule.
        generator: it may become the model that the next generators start from, with the present
            adapter, if it writes admissible programs as often.
        task_vectors: the task vectors on a new base: recomputed as expert - base, or kept as
            expert - seed.
        samples: programs that are sampled from a merged model before it becomes the generator. If
            the present one wrote fewer in the iteration, it is sampled for the rest.
        tolerance: how much smaller its share of admissible samples may be than the present one.
    """

    base: bool = True
    generator: bool = False
    task_vectors: Literal["recomputed", "kept"] = "recomputed"
    samples: PositiveInt = 64
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _check_roles(self) -> CoevolutionConfig:
        if not self.base and not self.generator:
            raise ValueError(
                "base and generator are both false, so nothing changes; set one to true, or "
                "coevolution to null"
            )
        return self
