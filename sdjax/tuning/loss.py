"""Loss of a merge on training problems, differentiable in the numbers that are tuned.

    loss(values) = mean over the completions' tokens of -log p(token | base + merge(values))

Base and experts are arguments of the compiled step, on the devices as they were loaded. A step
loops over parts of its batch, so that activations exist for one part at a time: XLA for CPUs drops
the barriers of `jax.checkpoint`, which elsewhere recompute each layer, and its merge, in the
backward pass.

Axes: parameters; see also `sdjax.training.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Problem, Task, call_checked
from sdjax.io.tokenizer import Tokenizer
from sdjax.merging.engine import Merger
from sdjax.merging.schedule import has_schedules
from sdjax.models.config import ModelConfig
from sdjax.models.tensor_names import parse_name
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.sharding.memory import exhaustion_reported, require_fit
from sdjax.sharding.rules import replicated
from sdjax.training.data import number_rows, tokenize_examples
from sdjax.training.fit import num_parts, rematerialize, shard_batch
from sdjax.training.packing import Example, pack, shuffled_batches, target_batches
from sdjax.training.sft import sft_loss
from sdjax.training.types import Batch
from sdjax.tuning.differentiability import blocking_operations
from sdjax.tuning.search import SearchConfig
from sdjax.tuning.types import Tunable

_MIN_LENGTH = 128  # of a packed row
_ROUND = 64
# Tokens per device in a part of a batch: enough for matrix products at full speed.
_PART_TOKENS = 1024
_GRADIENT = "the gradient"
_REMEDY = "tune by CMA-ES (optimizer cmaes), or use a machine with more memory"


def training_examples(
    task: Task,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    chat: bool = False,
) -> list[Example]:
    """Return training problems as tokens: the prompt without worked examples, and the completion.

    Args:
        task: formats the problems.
        problems: its training problems.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of prompt plus completion.
        chat: use the tokenizer's chat template.

    Raises:
        UserError: the task fails to format a problem, or no problem fits.
    """
    rows = []
    for problem in problems:
        prompt = call_checked(task, "prompt", (str,), problem)
        completion = call_checked(task, "completion", (str,), problem)
        if chat:
            messages = [("user", prompt), ("assistant", completion.strip())]
            rows.append({"messages": [{"role": r, "content": text} for r, text in messages]})
        else:
            rows.append({"prompt": prompt, "completion": completion})
    return tokenize_examples(
        number_rows(f"task {task.name}, training", rows), tokenizer, max_length
    )


def packed_length(examples: Sequence[Example], max_seq_len: int) -> int:
    """Return the tokens per row: enough for the longest example, and for a few short ones."""
    longest = max(map(len, examples))
    return min(max_seq_len, max(_MIN_LENGTH, -(-longest // _ROUND) * _ROUND))


def rows_per_part(batch: int, length: int, devices: int = 1) -> int:
    """Return the number of rows that a step processes at a time, a divisor of the batch.

    Args:
        batch: rows per step.
        length: tokens per row.
        devices: number of devices that rows are divided over, a divisor of the batch.
    """
    most = max(1, _PART_TOKENS // length) * devices
    divisors = [rows for rows in range(devices, batch + 1, devices) if batch % rows == 0]
    return max([rows for rows in divisors if rows <= most], default=batch)


def tuning_batches(
    examples: Sequence[Example],
    config: SearchConfig,
    *,
    length: int,
    rows: int,
    devices: int = 1,
) -> list[list[list[Batch]]]:
    """Return the parts of the batch of each start and step, all of the same shape.

    Args:
        examples: the training problems.
        config: seed, starts, steps and rows per batch.
        length: tokens per row.
        rows: rows per part.
        devices: number of devices that the rows of a part are divided over.
    """
    data = pack(examples, length)
    count = config.batch // rows
    indices = [
        part
        for start in range(config.starts)
        for part in shuffled_batches(
            len(data["tokens"]),
            batch_size=rows,
            num_batches=config.steps * count,
            key=jax.random.key(config.seed + start),
        )
    ]
    parts = target_batches(data, indices, parts=devices)
    return [
        [[next(parts) for _ in range(count)] for _ in range(config.steps)]
        for _ in range(config.starts)
    ]


class MergeLoss:
    """The loss and its gradient, compiled once for all steps and starts.

    Attributes:
        tokens: number of tokens in a batch, with padding.
    """

    def __init__(
        self,
        merger: Merger,
        tunable: Tunable,
        params: Params,
        *,
        config: ModelConfig,
        compute_dtype: DTypeLike,
        key: jax.Array,
        examples: Sequence[Example],
        search: SearchConfig,
    ) -> None:
        """Prepare the loss; compilation happens at its first use.

        Args:
            merger: merger of the base and the experts.
            tunable: what is tuned.
            params: the base's parameters.
            config: architecture of the models.
            compute_dtype: dtype of activations and of merged weights in the forward pass.
            key: typed PRNG key of the merge, for random methods.
            examples: the training problems.
            search: seed, starts, steps and rows per batch.
        """
        length = packed_length(examples, config.max_seq_len)
        self._merger, self._tunable, self._key = merger, tunable, key
        self._config, self._dtype = config, compute_dtype
        others = {p: x for p, x in flatten(params).items() if p not in merger.changed}
        self._frozen = {"others": others, "tensors": dict(merger.tensors)}
        self._sharding = replicated(params)
        devices = num_parts(params, search.batch)
        rows = rows_per_part(search.batch, length, devices)
        self._batches = tuning_batches(examples, search, length=length, rows=rows, devices=devices)
        self._params = params
        self.tokens = search.batch * length

    def __call__(self, values: np.ndarray, start: int, step: int) -> tuple[float, np.ndarray]:
        """Return the loss on a batch, and its gradient [parameters].

        Raises:
            MemoryLimitExceeded: the gradient needs more memory than there is.
        """
        batch = self._device_batch(start, step)
        with exhaustion_reported(_GRADIENT, remedy=_REMEDY):
            loss, gradient = self.compiled(np.asarray(values, np.float32), self._frozen, batch)
        return float(loss), np.asarray(gradient, np.float64)

    @cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The executable of (values, frozen, batch) -> (loss, gradient).

        Raises:
            MemoryLimitExceeded: it needs more memory than the devices have.
        """
        executable = self._traced.lower().compile()
        require_fit(executable, _GRADIENT, remedy=_REMEDY)
        return executable

    def blocking(self) -> dict[int, tuple[str, ...]]:
        """Return the numbers without a gradient and the operations that prevent it.

        Traces the loss as well, for operations that JAX cannot differentiate.
        """
        size = len(self._tunable.parameters)
        blocked = blocking_operations(self._representative_merges, size)
        if len(blocked) < size:
            try:
                _ = self._traced
            except (UserError, NotImplementedError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())[:120]
                blocked = {index: blocked.get(index, (reason,)) for index in range(size)}
        return blocked

    @cached_property
    def _traced(self) -> jax.stages.Traced:
        loss = rematerialize(sft_loss(self._config, self._assemble))

        @partial(jax.jit, out_shardings=self._sharding)
        def step(values: jax.Array, frozen: Any, parts: list[Batch]) -> tuple[jax.Array, jax.Array]:
            def add(total: Any, part: Batch) -> tuple[Any, None]:
                (mean, metrics), slope = jax.value_and_grad(loss, has_aux=True)(
                    values, frozen, part
                )
                # Parts have different numbers of tokens in the loss.
                count = metrics["tokens"]
                return jax.tree.map(jnp.add, total, (mean * count, slope * count, count)), None

            zeros = (jnp.float32(0), jnp.zeros_like(values), jnp.float32(0))
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)
            (value, slope, count), _ = jax.lax.scan(add, zeros, stacked)
            return value / count, slope / count

        values = np.asarray(self._tunable.start, np.float32)
        return step.trace(values, self._frozen, self._device_batch(0, 0))

    def _assemble(self, values: Float[Array, " parameters"], frozen: Any) -> tuple[Params, None]:
        merged = self._merger.merge_in_trace(
            self._tunable.bind(values), frozen["tensors"], key=self._key
        )
        leaves = {**frozen["others"], **merged}
        return unflatten({path: x.astype(self._dtype) for path, x in leaves.items()}), None

    def _representative_merges(self, values: Float[Array, " parameters"]) -> Any:
        """Return merged tensors: one per kind and shape, all that the tensor form compiles.

        Numbers that differ between layers reach only some tensors, so that all are needed.
        """
        algorithm = self._tunable.bind(values)
        tensors = dict(self._merger.tensors)
        if algorithm.form == "tensor" and not has_schedules(algorithm.hyperparameters):
            places = {
                (parse_name(path).kind, parse_name(path).layer is None, experts[0].shape): path
                for path, (_, experts) in tensors.items()
                if path in self._merger.changed
            }
            tensors = {path: tensors[path] for path in places.values()}
        return self._merger.merge_in_trace(algorithm, tensors, key=self._key)

    def _device_batch(self, start: int, step: int) -> list[Batch]:
        return [shard_batch(part, self._params) for part in self._batches[start][step]]
