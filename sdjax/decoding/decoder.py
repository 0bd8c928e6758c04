"""Batched decoding: a fixed number of slots, rounds that end early, and refill between rounds.

Two programs are compiled a prompt bucket: `admit` computes the prompts of a few rows and puts
them into free slots, `advance` lets all slots produce until enough of them are free again. The
weights are arguments of both, so that another model of the same shapes compiles nothing.

Axes: B slots, R rows admitted at once, P bucket (padded prompt length), M most new tokens,
S = P + M cached positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.decoding.sampling import Sampling, sample
from sdjax.decoding.state import State, append, empty_state
from sdjax.errors import UserError
from sdjax.models.adapter import Adapter
from sdjax.models.config import ModelConfig
from sdjax.models.transformer import forward, unembed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model produced behind one prompt.

    Attributes:
        tokens: without the stop token.
        stopped: whether a stop token ended it, rather than the limit.
    """

    tokens: tuple[int, ...]
    stopped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """The sizes that a decoder is compiled for.

    Attributes:
        slots: sequences that are decoded side by side.
        rows: prompts that are computed at once, at most `slots`.
        buckets: padded prompt lengths, ascending.
        max_new_tokens: the most tokens behind a prompt, stop token included.
    """

    slots: int = 64
    rows: int = 32
    buckets: tuple[int, ...] = (32, 64, 128, 256)
    max_new_tokens: int = 64

    def __post_init__(self):
        if not 0 < self.rows <= self.slots:
            raise UserError(f"decoding.rows is {self.rows}: it must be 1 to slots ({self.slots})")
        if list(self.buckets) != sorted(set(self.buckets)) or not self.buckets:
            raise UserError(f"decoding.buckets {self.buckets} must be distinct and ascending")


class Decoder:
    """Decodes prompts with any weights of one configuration."""

    def __init__(
        self,
        config: ModelConfig,
        settings: DecoderSettings,
        *,
        stop_tokens: Sequence[int] | None = None,
        compute_dtype: jnp.dtype = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Compiles nothing yet.

        Args:
            config: of the models to come.
            settings: the compiled sizes.
            stop_tokens: the tokens that end a sequence; the configuration's end tokens by default.
            compute_dtype: of activations and cache; the weights are cast once a call.
            mesh: where to decode; the slots are spread over its `data` axis.
        """
        self.config = config
        self.settings = settings
        stops = config.eos_tokens if stop_tokens is None else stop_tokens
        self.stops = jnp.asarray(stops, jnp.int32)
        self.compute_dtype = compute_dtype
        # Every leaf of the state has the slots as its first axis.
        spread = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        compiled = partial(
            jax.jit, static_argnames="greedy", donate_argnames="state", out_shardings=spread
        )
        self._admit = compiled(self._admit_rows)
        self._advance = compiled(self._advance_slots)
        self._empty = jax.jit(self._empty_state, static_argnums=0, out_shardings=spread)
        # What the loop reads is whole on every process.
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._progress = jax.jit(
            lambda state: (state.active, state.count, state.produced, state.stopped),
            out_shardings=whole,
        )
        self._cast = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(compute_dtype), params))

    def decode(
        self,
        params: dict,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling | None = None,
        key: jax.Array | None = None,
        numbers: Sequence[int] | None = None,
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Completes every prompt; in the order of the prompts.

        What is drawn for a prompt depends on `key`, its number and the position alone.

        Args:
            params: the weights, in any float dtype.
            adapter: LoRA factors or None.
            prompts: token lists.
            sampling: greedy by default.
            key: a typed PRNG key; needed where the sampling is not greedy.
            numbers: of the prompts, to draw by; their indices by default.
            on_finished: called with index and completion as soon as one is known.

        Raises:
            UserError: an empty prompt, or one that is longer than the largest bucket.
        """
        sampling = sampling or Sampling()
        key = jax.random.key(0) if key is None else key
        numbers = range(len(prompts)) if numbers is None else numbers
        params = self._cast(params)
        results: dict[int, Completion] = {}
        for bucket, indices in self._by_bucket(prompts).items():
            for index, completion in self._decode_bucket(
                params, adapter, prompts, numbers, bucket, indices, sampling, key
            ):
                results[index] = completion
                if on_finished is not None:
                    on_finished(index, completion)
        return [results[index] for index in range(len(prompts))]

    def _by_bucket(self, prompts: Sequence[Sequence[int]]) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {bucket: [] for bucket in self.settings.buckets}
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} is empty: a model needs at least one token")
            fitting = [bucket for bucket in self.settings.buckets if bucket >= len(prompt)]
            if not fitting:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, more than the largest bucket "
                    f"({self.settings.buckets[-1]}): add a larger one to decoding.buckets"
                )
            groups[fitting[0]].append(index)
        return {bucket: indices for bucket, indices in groups.items() if indices}

    def _decode_bucket(self, params, adapter, prompts, numbers, bucket, indices, sampling, key):
        """Yields (index, completion) of the prompts of one bucket as they finish."""
        slots, rows = self.settings.slots, self.settings.rows
        draw = {
            "key": key,
            "temperature": jnp.float32(sampling.temperature),
            "top_p": None if sampling.top_p >= 1.0 else jnp.float32(sampling.top_p),
            "greedy": sampling.greedy,
        }
        state = self._empty(bucket)
        waiting = list(reversed(indices))
        owner: list[int | None] = [None] * slots
        while waiting or any(index is not None for index in owner):
            free = [slot for slot, index in enumerate(owner) if index is None]
            while waiting and free:
                batch = [waiting.pop() for _ in range(min(rows, len(free), len(waiting)))]
                chosen, free = free[: len(batch)], free[len(batch) :]
                for slot, index in zip(chosen, batch, strict=True):
                    owner[slot] = index
                admitted = _padded(
                    [prompts[index] for index in batch],
                    chosen,
                    bucket=bucket,
                    rows=rows,
                    slots=slots,
                )
                admitted["examples"][: len(batch)] = [numbers[index] for index in batch]
                state = self._admit(params, adapter, state, **admitted, **draw)
            # With prompts waiting, a round ends as soon as a full batch of slots is free.
            enough = slots - rows if waiting else 0
            state = self._advance(params, adapter, state, enough=np.int32(enough), **draw)
            active, count, produced, stopped = jax.device_get(self._progress(state))
            for slot, index in enumerate(owner):
                if index is not None and not active[slot]:
                    tokens = tuple(int(token) for token in produced[slot, : count[slot]])
                    yield index, Completion(tokens=tokens, stopped=bool(stopped[slot]))
                    owner[slot] = None

    def _empty_state(self, bucket: int) -> State:
        return empty_state(
            self.config,
            slots=self.settings.slots,
            cached=bucket + self.settings.max_new_tokens,
            max_new_tokens=self.settings.max_new_tokens,
            dtype=self.compute_dtype,
        )

    def _admit_rows(
        self,
        params,
        adapter,
        state,
        tokens,
        lengths,
        slots,
        examples,
        key,
        temperature,
        top_p,
        greedy,
    ) -> State:
        """Computes prompts [R, P] and puts them into `slots` [R]; a slot number B drops its row."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, fresh = forward(
            params,
            adapter,
            tokens,
            config=self.config,
            positions=positions,
            reach=state.cache[0]["k"].shape[1],
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [R, D]
        logits = unembed(params, last, config=self.config)
        first = self._choose(logits, key, examples, lengths, temperature, top_p, greedy)

        def put(old: jax.Array, new: jax.Array | int | bool) -> jax.Array:
            return old.at[slots].set(new, mode="drop")

        started = put(jnp.zeros_like(state.active), True)
        filled = dataclasses.replace(
            state,
            cache=[
                {
                    name: entry[name].at[slots, : tokens.shape[1]].set(new[name], mode="drop")
                    for name in ("k", "v")
                }
                for entry, new in zip(state.cache, fresh, strict=True)
            ],
            count=put(state.count, 0),
            position=put(state.position, lengths - 1),
            stopped=put(state.stopped, False),
            example=put(state.example, examples),
            active=started,
        )
        begun = append(filled, put(state.last, first), self.stops)
        return dataclasses.replace(begun, active=begun.active | (state.active & ~started))

    def _advance_slots(
        self, params, adapter, state, enough, key, temperature, top_p, greedy
    ) -> State:
        """Lets all active slots produce until at most `enough` of them are left."""

        def unfinished(state: State) -> jax.Array:
            return jnp.sum(state.active) > enough

        def step(state: State) -> State:
            position = state.position + state.active
            hidden, cache = forward(
                params,
                adapter,
                state.last[:, None],
                config=self.config,
                positions=position[:, None],
                cache=state.cache,
            )
            logits = unembed(params, hidden[:, 0], config=self.config)
            chosen = self._choose(
                logits, key, state.example, position + 1, temperature, top_p, greedy
            )
            advanced = dataclasses.replace(state, cache=cache, position=position)
            return append(advanced, chosen, self.stops)

        return jax.lax.while_loop(unfinished, step, state)

    def _choose(self, logits, key, examples, positions, temperature, top_p, greedy) -> jax.Array:
        """The next token of each row, which will stand at `positions` of its sequence."""
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def fold(example: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(key, example), position)

        return sample(logits, jax.vmap(fold)(examples, positions), temperature, top_p)


def _padded(
    prompts: Sequence[Sequence[int]], chosen: Sequence[int], *, bucket: int, rows: int, slots: int
) -> dict[str, np.ndarray]:
    """The arguments of one admission; missing rows go to slot number `slots`, which is none."""
    arguments = {
        "tokens": np.zeros((rows, bucket), np.int32),
        "lengths": np.ones(rows, np.int32),
        "slots": np.full(rows, slots, np.int32),
        "examples": np.zeros(rows, np.int32),
    }
    for row, (prompt, slot) in enumerate(zip(prompts, chosen, strict=True)):
        arguments["tokens"][row, : len(prompt)] = prompt
        arguments["lengths"][row] = len(prompt)
        arguments["slots"][row] = slot
    return arguments
