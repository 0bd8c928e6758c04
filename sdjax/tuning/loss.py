"""Loss of a merge on training problems, differentiable in the numbers that are tuned.

    loss(values) = mean over the completions' tokens of -log p(token | base + merge(values))

A step has four parts, which are compiled separately, so that another merge of the same models
compiles only what is its own:

1. the merged tensors, by the executables of a merge;
2. the model's loss and its gradient in them, by one executable for all merges (`model_gradient`);
3. from there to the hyperparameters, by small executables per kind and shape (`merge_gradient`);
4. from the hyperparameters to the values, on the host's numbers.

Memory: during a step there are, next to base and experts, the merged tensors in their stored dtype
and their gradient in float32 (and see `model_gradient`). For n elements in scope stored in bfloat16
that is 6n bytes: 34 GB for the 5.6 billion of Mistral-7B's MLPs, over all chips together. The merge
itself is not part of the model's backward pass, so nothing of it is stored or recomputed there.

Axes: parameters; see also `sdjax.training.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Problem, Task, call_checked
from sdjax.io.tokenizer import Tokenizer
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import Merger
from sdjax.merging.merge_gradient import (
    Hyperparameters,
    hyperparameter_gradient,
    hyperparameters_by_tensor,
    trace_gradient,
)
from sdjax.models.config import ModelConfig
from sdjax.models.tree import flatten
from sdjax.models.types import Params
from sdjax.sharding.memory import exhaustion_reported, require_fit
from sdjax.training.data import number_rows, tokenize_examples
from sdjax.training.fit import num_parts, shard_batch
from sdjax.training.packing import Example, pack, shuffled_batches, target_batches
from sdjax.training.types import Batch
from sdjax.tuning.differentiability import FORWARD_ONLY, blocking_operations
from sdjax.tuning.effect import representative_merges, representative_tensors
from sdjax.tuning.model_gradient import ModelGradient
from sdjax.tuning.search import SearchConfig
from sdjax.tuning.types import Tunable
from sdjax.xla.differentiation import NOT_DIFFERENTIABLE

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
    """The loss and its gradient, for all steps and starts of a search.

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
        compile_cache: CompileCache | None = None,
    ) -> None:
        """Prepare the loss; compilation happens at its first use.

        Args:
            merger: merger of the base and the experts; its cache keeps the executables of merges
                and of their gradients.
            tunable: what is tuned.
            params: the base's parameters.
            config: architecture of the models.
            compute_dtype: dtype of activations and of merged weights in the forward pass.
            key: typed PRNG key of the merge, for random methods.
            examples: the training problems.
            search: seed, starts, steps and rows per batch.
            compile_cache: cache of the model's gradient, which several losses may share.
        """
        length = packed_length(examples, config.max_seq_len)
        self._merger, self._tunable, self._key = merger, tunable, key
        self._config, self._dtype = config, compute_dtype
        leaves = flatten(params)
        self._scope = {path: leaves[path] for path in merger.changed}
        self._others = {path: x for path, x in leaves.items() if path not in merger.changed}
        devices = num_parts(params, search.batch)
        rows = rows_per_part(search.batch, length, devices)
        self._batches = tuning_batches(examples, search, length=length, rows=rows, devices=devices)
        self._params = params
        self._compile_cache = CompileCache() if compile_cache is None else compile_cache
        self.tokens = search.batch * length

    def __call__(self, values: np.ndarray, start: int, step: int) -> tuple[float, np.ndarray]:
        """Return the loss on a batch, and its gradient [parameters].

        Raises:
            MemoryLimitExceeded: the gradient needs more memory than there is.
        """
        batch = self._device_batch(start, step)
        executable = self.model_gradient(batch)
        algorithm = self._tunable.bind(values)
        with exhaustion_reported(_GRADIENT, remedy=_REMEDY):
            merged = flatten(self._merger(algorithm, key=self._key).params)
            scope = {path: merged[path] for path in self._scope}
            loss, gradient = executable(scope, self._others, batch)
            del merged, scope
            cotangents = hyperparameter_gradient(self._merger, algorithm, gradient, key=self._key)
        slopes = self._pull_back(np.asarray(values, np.float32), cotangents)
        return float(loss), np.asarray(slopes, np.float64)

    def model_gradient(self, batch: list[Batch] | None = None) -> jax.stages.Compiled:
        """Return the executable of (tensors in scope, others, parts) -> (loss, gradient).

        Args:
            batch: parts of a batch on the devices; by default the first one.

        Raises:
            MemoryLimitExceeded: it needs more memory than the devices have, with the base and the
                experts that stay there.
        """
        batch = self._device_batch(0, 0) if batch is None else batch
        described = ModelGradient.of(
            self._config, self._scope, self._others, batch, compute_dtype=self._dtype
        )
        (executable,) = self._compile_cache.get([described])
        # Its arguments are the merged tensors, in place of the base's.
        resident = jax.tree.leaves(dict(self._merger.tensors))
        require_fit(
            executable,
            _GRADIENT,
            remedy=_REMEDY,
            resident=sum(leaf.nbytes for leaf in resident),
        )
        return executable

    def blocking(self) -> dict[int, tuple[str, ...]]:
        """Return the numbers without a gradient and the operations that prevent it.

        Traces the gradient of the merge as well, for operations that JAX cannot differentiate.
        """
        size = len(self._tunable.parameters)
        merges = representative_merges(self._merger, self._tunable, self._key)
        blocked = blocking_operations(merges, size)
        if len(blocked) < size:
            algorithm = self._tunable.bind(self._tunable.start)
            tensors = representative_tensors(self._merger, algorithm)
            try:
                trace_gradient(self._merger, algorithm, tensors, key=self._key)
            except (UserError, *NOT_DIFFERENTIABLE) as error:
                known = FORWARD_ONLY & {name for found in blocked.values() for name in found}
                reason = tuple(sorted(known)) or (" ".join(str(error).split())[:120],)
                blocked = {index: blocked.get(index, reason) for index in range(size)}
        return blocked

    @cached_property
    def _pull_back(self) -> Callable[[np.ndarray, Hyperparameters], jax.Array]:
        """The function of (values, cotangents of hyperparameters) -> gradient [parameters]."""

        def hyperparameters(values: Float[Array, " parameters"]) -> Hyperparameters:
            return hyperparameters_by_tensor(self._merger, self._tunable.bind(values))

        @jax.jit
        def pull_back(values: jax.Array, cotangents: Hyperparameters) -> jax.Array:
            primals, transposed = jax.vjp(hyperparameters, values)
            like = jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), cotangents, primals)
            return transposed(like)[0]

        return pull_back

    def _device_batch(self, start: int, step: int) -> list[Batch]:
        return [shard_batch(part, self._params) for part in self._batches[start][step]]
