"""Log-probabilities of given texts: how likely a model finds a continuation.

Axes: R texts computed at once, P bucket (padded length), D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.transformer import forward, unembed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How a model finds one continuation.

    Attributes:
        logprobs: natural logarithm of the probability of each of its tokens, given all before.
        greedy: whether each of them is the most probable one.
        failure: why it could not be scored, or None.
    """

    logprobs: tuple[float, ...] = ()
    greedy: bool = False
    failure: str | None = None

    @property
    def total(self) -> float:
        """The logarithm of the probability of the whole continuation."""
        return sum(self.logprobs)


class Scorer:
    """Scores continuations with any weights of one configuration; one program a bucket."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rows: int = 16,
        buckets: tuple[int, ...] = (64, 128, 256, 512),
        compute_dtype: jnp.dtype = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Compiles nothing yet.

        Args:
            config: of the models to come.
            rows: texts computed at once.
            buckets: padded lengths of prompt and continuation together, ascending.
            compute_dtype: the weights are cast to it once a call.
            mesh: where the weights lie, if on several devices.
        """
        if list(buckets) != sorted(set(buckets)) or not buckets or rows < 1:
            raise UserError(f"scoring: rows {rows} and buckets {buckets} must be positive, rising")
        self.config, self.rows, self.buckets = config, rows, buckets
        # What the host reads is whole on every process.
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._score = jax.jit(self._score_rows, out_shardings=whole)
        self._cast = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(compute_dtype), params))

    def score(
        self,
        params: dict,
        adapter: Adapter | None,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> list[Score]:
        """Scores pairs of prompt and continuation, in their order.

        A pair that lacks either, or is longer than the largest bucket or the context, is a score
        with a `failure`.
        """
        longest = min(self.buckets[-1], self.config.max_seq_len)
        groups: dict[int, list[int]] = {bucket: [] for bucket in self.buckets}
        scores: dict[int, Score] = {}
        for index, (prompt, continuation) in enumerate(texts):
            size = len(prompt) + len(continuation)
            if not len(prompt) or not len(continuation):
                scores[index] = Score(failure="the prompt or the continuation is empty")
            elif size > longest:
                scores[index] = Score(
                    failure=f"the text has {size} tokens, of which at most {longest} fit"
                )
            else:
                groups[next(b for b in self.buckets if b >= size)].append(index)
        params = self._cast(params)
        for bucket, indices in groups.items():
            for start in range(0, len(indices), self.rows):
                batch = indices[start : start + self.rows]
                tokens = np.zeros((self.rows, bucket), np.int32)
                for row, index in zip(tokens, batch, strict=False):
                    whole = [*texts[index][0], *texts[index][1]]
                    row[: len(whole)] = whole
                logprobs, greedy = jax.device_get(self._score(params, adapter, tokens))
                for place, index in enumerate(batch):
                    first = len(texts[index][0]) - 1
                    part = slice(first, first + len(texts[index][1]))
                    scores[index] = Score(
                        logprobs=tuple(logprobs[place, part].tolist()),
                        greedy=bool(greedy[place, part].all()),
                    )
        return [scores[index] for index in range(len(texts))]

    def _score_rows(self, params, adapter, tokens) -> tuple[jax.Array, jax.Array]:
        """Of tokens [R, P], entry t for token t + 1: log-probability, and whether it is greedy."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = forward(params, adapter, tokens, config=self.config, positions=positions)

        def of_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits = unembed(params, row[0], config=self.config)  # [P - 1, V]
            chosen = jnp.take_along_axis(logits, row[1][:, None], axis=-1)[:, 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= logits.max(axis=-1)

        # The logits of one text exist at a time.
        return jax.lax.map(of_row, (hidden[:, :-1], tokens[:, 1:]))
