"""Sums over a batch: squared gradients, products of inputs of linear maps.

The sums are a flat dict with the names of `sdjax.merging.statistics`; divided by the numbers of
examples and tokens they are the statistics.

Axes: batch, time; in, out (of a linear map); see also `sdjax.models.types`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sdjax.merging.statistics import SAME_INPUT
from sdjax.models.config import ModelConfig
from sdjax.models.params import param_specs
from sdjax.models.transformer import RESIDUAL, forward, unembed
from sdjax.models.tree import flatten
from sdjax.models.types import Params
from sdjax.sharding.rules import sharding_of
from sdjax.statistics.config import StatisticsConfig
from sdjax.training.logprobs import head_params, target_logprobs
from sdjax.training.types import Batch

Sums = dict[str, jax.Array]

_MAX_LOGITS = 1 << 24  # drawn from at a time (64 MiB)


def zero_sums(config: ModelConfig, settings: StatisticsConfig, mesh: Mesh | None = None) -> Sums:
    """Return the sums over no examples, float32, sharded like the model.

    Args:
        config: config of the model.
        settings: the statistics.
        mesh: mesh of the model; the default device by default.
    """
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for path, spec in param_specs(config).items():
        if "fisher" in settings.kinds:
            shapes[f"fisher/{path}"] = spec.shape, spec.axes
        if _is_observed(path):
            size, axis = spec.shape[1], spec.axes[1]
            if "gram" in settings.kinds:
                shapes[f"gram/{path}"] = (size, size), (axis, "")
            if "input_norm" in settings.kinds:
                shapes[f"input_norm/{path}"] = (size,), (axis,)
    return {
        name: jnp.zeros(
            shape, jnp.float32, device=None if mesh is None else sharding_of(shape, axes, mesh)
        )
        for name, (shape, axes) in sorted(shapes.items())
    }


def add_batch(
    params: Params,
    sums: Sums,
    batch: Batch,
    *,
    config: ModelConfig,
    settings: StatisticsConfig,
) -> Sums:
    """Return the sums with those of one more batch.

    Args:
        params: weights of the model.
        sums: sums so far.
        batch: a batch of `sdjax.statistics.examples.batches`.
        config: config of the model.
        settings: the statistics.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    new = dict(sums)
    if set(settings.kinds) & {"gram", "input_norm"}:
        for name, value in _input_products(params, batch, config).items():
            if name in sums:
                new[name] = sums[name] + value
    if "fisher" in settings.kinds:
        names = [name for name in sums if name.startswith("fisher/")]
        totals = _add_squared_gradients(
            params, {name: sums[name] for name in names}, batch, config, settings
        )
        new |= totals
    return new


def means(sums: Sums, *, examples: int, tokens: int) -> Sums:
    """Return the statistics.

    Args:
        sums: sums over all examples.
        examples: number of examples.
        tokens: number of their tokens.
    """

    def mean(name: str) -> jax.Array:
        if name.startswith("fisher/"):
            return sums[name] / examples
        per_token = sums[name] / tokens
        return jnp.sqrt(per_token) if name.startswith("input_norm/") else per_token

    return {name: mean(name) for name in sums}


def _is_observed(path: str) -> bool:
    """Return whether the input of this tensor's linear map is kept under its own name."""
    if path == "lm_head":
        return True
    kind = "/".join(path.split("/")[2:])
    return kind.endswith("_proj") and kind not in SAME_INPUT


def _input_products(params: Params, batch: Batch, config: ModelConfig) -> Sums:
    """Return the sum of x xᵀ over the tokens, and its diagonal, for the input x of each map."""
    tokens = batch["tokens"]  # [batch time]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    valid = positions < batch["lengths"][:, None]
    products: Sums = {}

    def observe(module: str, name: str, x: Float[Array, "batch time in"]) -> None:
        path = f"{module}/{name}".strip("/")
        if not _is_observed(path):
            return
        rows = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
        products[f"gram/{path}"] = jnp.matmul(rows.T, rows, precision="highest")
        products[f"input_norm/{path}"] = jnp.sum(rows * rows, axis=0)

    hidden, _ = forward(params, None, tokens, config=config, positions=positions, observe=observe)
    if "lm_head" in params:
        observe("", "lm_head", hidden)
    return products


def _add_squared_gradients(
    params: Params, sums: Sums, batch: Batch, config: ModelConfig, settings: StatisticsConfig
) -> Sums:
    """Return the sums plus the squared gradient of each example's log-likelihood."""
    key = jax.random.key(settings.seed)

    def add(total: Sums, row: Batch) -> tuple[Sums, None]:
        tokens = row["tokens"]  # [time]
        place = jnp.arange(len(tokens) - 1)
        weights = (place >= row["prompts"] - 1) & (place < row["lengths"] - 1)
        targets = tokens[1:]
        if settings.labels == "model":
            own = jax.random.fold_in(key, row["index"])
            targets = _drawn_targets(params, tokens, own, config)

        def loglikelihood(params: Params) -> jax.Array:
            hidden = _states(params, tokens, config)
            head = head_params(params)
            logprobs = target_logprobs(
                partial(unembed, config=config), head, hidden[None, :-1], targets[None]
            )
            return jnp.sum(jnp.where(weights, logprobs[0], 0.0))

        policy = jax.checkpoint_policies.save_only_these_names(RESIDUAL)
        gradient = flatten(jax.grad(jax.checkpoint(loglikelihood, policy=policy))(params))
        squares = {f"fisher/{p}": jnp.square(g.astype(jnp.float32)) for p, g in gradient.items()}
        return {name: total[name] + squares[name] for name in total}, None

    totals, _ = jax.lax.scan(add, sums, batch)
    return totals


def _states(params: Params, tokens: Int[Array, " time"], config: ModelConfig) -> jax.Array:
    """Return the final hidden states [time hidden] of one sequence."""
    positions = jnp.arange(len(tokens))[None]
    hidden, _ = forward(params, None, tokens[None], config=config, positions=positions)
    return hidden[0]


def _drawn_targets(
    params: Params, tokens: Int[Array, " time"], key: Key[Array, ""], config: ModelConfig
) -> Int[Array, " time-1"]:
    """Return a token drawn from the model at each position, given the data up to there."""
    states = _states(params, tokens, config)[:-1]
    head, count = head_params(params), len(tokens) - 1
    chunks = -(-count * config.vocab_size // _MAX_LOGITS)
    size = -(-count // chunks)
    padded = jnp.pad(states, ((0, chunks * size - count), (0, 0)))

    def draw(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, part = chunk
        logits = unembed(head, part, config=config)
        return jax.random.categorical(jax.random.fold_in(key, number), logits)

    parts = padded.reshape(chunks, -1, states.shape[-1])
    return jax.lax.map(draw, (jnp.arange(chunks), parts)).reshape(-1)[:count]
