"""Log-probabilities of given continuations.

Axes: see `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.transformer import forward, unembed
from sdjax.models.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Score of one continuation.

    Attributes:
        logprobs: natural log-probability of each token, given all tokens before it.
        greedy: whether every token is the most probable one.
        failure: reason why the continuation could not be scored, or None.
    """

    logprobs: tuple[float, ...] = ()
    greedy: bool = False
    failure: str | None = None

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.logprobs)


class Scorer:
    """Scorer of continuations with any weights of one model config; compiles once per bucket."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 16,
        buckets: tuple[int, ...] = (64, 128, 256, 512),
        compute_dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
    ):
        """Create a scorer; compilation happens at first use.

        Args:
            config: config of the models.
            batch_size: number of texts per call.
            buckets: padded lengths of prompt and continuation together, in ascending order.
            compute_dtype: dtype of activations; weights are cast once per call.
            mesh: devices that hold the weights, if there are several.

        Raises:
            UserError: the batch size or the buckets are invalid.
        """
        if batch_size < 1 or not buckets or list(buckets) != sorted(set(buckets)):
            raise UserError(
                f"Scorer: batch_size {batch_size} must be positive, and buckets {buckets} distinct "
                "and ascending"
            )
        self.config, self.batch_size, self.buckets = config, batch_size, buckets
        # Every process reads the scores, so they must not be sharded.
        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._score_batch = jax.jit(self._batch_logprobs, out_shardings=replicated)
        self._cast = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(compute_dtype), params))

    def score(
        self,
        params: Params,
        adapter: Adapter | None,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> list[Score]:
        """Score pairs of prompt and continuation, given as token ids, in order.

        A pair with an empty part, or longer than the largest bucket or the context, yields a score
        with a `failure`.
        """
        max_length = min(self.buckets[-1], self.config.max_seq_len)
        groups: dict[int, list[int]] = {bucket: [] for bucket in self.buckets}
        scores: dict[int, Score] = {}
        for index, (prompt, continuation) in enumerate(texts):
            length = len(prompt) + len(continuation)
            if not len(prompt) or not len(continuation):
                scores[index] = Score(failure="the prompt or the continuation is empty")
            elif length > max_length:
                scores[index] = Score(
                    failure=f"the text has {length} tokens, more than the maximum of {max_length}"
                )
            else:
                groups[next(b for b in self.buckets if b >= length)].append(index)
        params = self._cast(params)
        for bucket, indices in groups.items():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                tokens = np.zeros((self.batch_size, bucket), np.int32)
                for row, index in zip(tokens, batch, strict=False):
                    prompt, continuation = texts[index]
                    row[: len(prompt) + len(continuation)] = [*prompt, *continuation]
                logprobs, greedy = jax.device_get(self._score_batch(params, adapter, tokens))
                for index, row_logprobs, row_greedy in zip(batch, logprobs, greedy, strict=False):
                    prompt, continuation = texts[index]
                    scored = slice(len(prompt) - 1, len(prompt) + len(continuation) - 1)
                    scores[index] = Score(
                        logprobs=tuple(row_logprobs[scored].tolist()),
                        greedy=bool(row_greedy[scored].all()),
                    )
        return [scores[index] for index in range(len(texts))]

    def _batch_logprobs(
        self, params: Params, adapter: Adapter | None, tokens: Int[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time-1"], Bool[Array, "batch time-1"]]:
        """Return each next token's log-probability, and whether it is the most probable one."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = forward(params, adapter, tokens, config=self.config, positions=positions)

        def score_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = row
            logits = unembed(params, hidden, config=self.config)  # [time-1 vocab]
            target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            logprobs = target_logits - jax.nn.logsumexp(logits, axis=-1)
            return logprobs, target_logits >= logits.max(axis=-1)

        # One text at a time, to limit the memory for logits.
        return jax.lax.map(score_row, (hidden[:, :-1], tokens[:, 1:]))
