"""Batched decoding: a fixed number of slots, rounds that end early, and refill between rounds.

`begin` computes what all prompts begin with, `admit` computes a few prompts of one bucket and seats
them in free slots, `share` seats further samples by copying the prompt's cache, and `advance` lets
all slots produce until enough of them are free again. `admit` is compiled once a bucket, the others
once. The weights are arguments of all, so that another model of the same shapes compiles nothing.

Axes: B slots, R prompts computed at once, L prefix, P bucket (padded prompt length), M most new
tokens, S cached positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.decoding import steps
from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.sampling import Sampling
from sdjax.decoding.schedule import Assignment, Schedule
from sdjax.decoding.state import Seats, State, empty_state, state_sharding
from sdjax.decoding.stopping import StopStrings
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter

# Between two looks at the text, where strings may end it.
_STEPS_A_LOOK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model produced behind one prompt.

    Attributes:
        tokens: without the stop token; up to the one that completes a stop string.
        stopped: whether a stop token or string ended it, rather than the limit.
        logprobs: natural logarithms of the tokens' probabilities by the model's own distribution,
            before temperature and the like; None where they were not asked for.
        text: what the tokens say, without the stop string; None without stop strings.
        failure: why the prompt could not be decoded, or None.
    """

    tokens: tuple[int, ...] = ()
    stopped: bool = False
    logprobs: tuple[float, ...] | None = None
    text: str | None = None
    failure: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of `decode` computed.

    Attributes:
        prompts: prompts computed; samples of one share it.
        prompt_tokens: theirs, behind the prefix.
        padded_tokens: the same with the padding of buckets and rows.
        new_tokens: produced, stop tokens included.
        steps: of all slots.
        slot_steps: steps times slots.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    padded_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    slot_steps: int = 0

    @property
    def occupancy(self) -> float:
        """The share of slots that produced something, over all steps."""
        return self.new_tokens / max(1, self.slot_steps)


class Decoder:
    """Decodes prompts with any weights of one configuration.

    Attributes:
        work: what the last call of `decode` computed.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: DecoderConfig,
        *,
        stop_token_ids: Sequence[int] | None = None,
        compute_dtype: jnp.dtype = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Compiles nothing yet.

        Args:
            config: of the models to come.
            settings: the compiled sizes.
            stop_token_ids: the tokens that end a sequence; the configuration's end tokens by default.
            compute_dtype: of activations and cache; the weights are cast once a call.
            mesh: where to decode; the slots are spread over its `data` axis, the cache's heads
                over `tensor`.
        """
        self.config = config
        self.settings = settings
        self.work = Work()
        stops = config.eos_token_ids if stop_token_ids is None else stop_token_ids
        self.stops = jnp.asarray(stops, jnp.int32)
        self.compute_dtype = compute_dtype
        # The newest token of a sequence needs no place in the cache.
        longest = len(settings.prefix) + settings.buckets[-1]
        self.cached = min(longest + settings.max_new_tokens - 1, config.max_seq_len)
        spread, whole = None, None
        if mesh is not None:
            spread = state_sharding(jax.eval_shape(partial(self._empty_state, True)), mesh)
            # What the host reads is whole on every process.
            whole = NamedSharding(mesh, PartitionSpec())

        def compiled(function: Callable, *static: str, out: object = spread) -> Callable:
            return jax.jit(
                function, static_argnames=static, donate_argnames="state", out_shardings=out
            )

        self._begin = jax.jit(self._begun, static_argnums=0, out_shardings=spread)
        prefix = len(settings.prefix)
        self._admit = compiled(partial(steps.admit, config=config, prefix=prefix))
        self._share = compiled(steps.share)
        read = None if mesh is None else (spread, whole)
        self._advance = compiled(partial(steps.advance, config=config), "top_k", out=read)
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
        stop_strings: StopStrings | None = None,
        logprobs: bool = False,
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Completes every prompt; in the order of the prompts.

        What is drawn for a prompt depends on `key`, its number and the position alone. A prompt
        that occurs several times is computed once, and each occurrence is a sample of its own. A
        prompt that is empty, or longer than the largest bucket or the context, is a completion
        with a `failure`. No sequence outgrows the context: behind a prompt as long as that comes
        one token.

        Args:
            params: the weights, in any float dtype.
            adapter: LoRA factors or None.
            prompts: token lists.
            sampling: greedy by default.
            key: a typed PRNG key; needed where the sampling is not greedy.
            numbers: of the prompts, to draw by; their indices by default.
            stop_strings: end a sequence beside the stop tokens.
            logprobs: whether to keep the tokens' log-probabilities.
            on_finished: called with index and completion as soon as one is known.
        """
        sampling = sampling or Sampling()
        numbers = range(len(prompts)) if numbers is None else numbers
        draws = {
            "key": jax.random.key(0) if key is None else key,
            "numbers": sampling.numbers(),
            "top_k": None if sampling.greedy else sampling.top_k,
        }
        self.work = Work()
        results: dict[int, Completion] = {}
        for index, completion in self._completions(
            params, adapter, prompts, numbers, draws, stop_strings, logprobs
        ):
            results[index] = completion
            if on_finished is not None:
                on_finished(index, completion)
        return [results[index] for index in range(len(prompts))]

    def _completions(
        self, params, adapter, prompts, numbers, draws, stop_strings, logprobs
    ) -> Iterator[tuple[int, Completion]]:
        """Index and completion of every prompt, as they become known."""
        fitting = {}
        for index, prompt in enumerate(prompts):
            failure = self._failure(prompt)
            if failure is None:
                fitting[index] = prompt[len(self.settings.prefix) :]
            else:
                yield index, Completion(failure=failure)
        if not fitting:
            return
        slots = self.settings.slots
        schedule = Schedule(
            fitting, self.settings.buckets, slots=slots, rows=self.settings.prefill_batch
        )
        if any(leaf.dtype != self.compute_dtype for leaf in jax.tree.leaves(params)):
            params = self._cast(params)
        prefix = np.array(self.settings.prefix, np.int32)
        state = self._begin(logprobs, params, adapter, prefix)
        most_steps = np.int32(_STEPS_A_LOOK if stop_strings else np.iinfo(np.int32).max)
        while schedule.busy:
            for bucket, seated in schedule.fill():
                if bucket is None:
                    seats = self._seats(seated, fitting, numbers, slots)
                    sources = _column([one.source or 0 for one in seated], slots)
                    state = self._share(state, seats=seats, sources=sources)
                else:
                    seats = self._seats(seated, fitting, numbers, self.settings.prefill_batch)
                    tokens = self._tokens(seated, fitting, bucket)
                    state = self._admit(params, adapter, state, tokens=tokens, seats=seats)
            state, seen = self._advance(
                params,
                adapter,
                state,
                owned=np.array([index is not None for index in schedule.owner]),
                enough=np.int32(slots - schedule.wanted),
                most_steps=most_steps,
                stops=self.stops,
                **draws,
            )
            seen = jax.device_get(seen)
            self._count(steps=int(seen["steps"]), slot_steps=int(seen["steps"]) * slots)
            for slot, owner in enumerate(schedule.owner):
                if owner is None or (seen["active"][slot] and not stop_strings):
                    continue
                completion = _completion(seen, slot, stop_strings)
                if completion.stopped or not seen["active"][slot]:
                    schedule.release(slot)
                    self._count(new_tokens=int(seen["count"][slot] + seen["stopped"][slot]))
                    yield owner, completion

    def _failure(self, prompt: Sequence[int]) -> str | None:
        prefix = self.settings.prefix
        longest = min(len(prefix) + self.settings.buckets[-1], self.config.max_seq_len)
        if not len(prompt):
            return "the prompt is empty: a model needs at least one token"
        lowest, highest = min(prompt), max(prompt)
        if lowest < 0 or highest >= self.config.vocab_size:
            return (
                f"token {highest if lowest >= 0 else lowest} is none of the model's "
                f"{self.config.vocab_size}: the tokenizer is another model's"
            )
        if tuple(prompt[: len(prefix)]) != prefix or len(prompt) == len(prefix):
            return "the prompt does not go on from the decoder's prefix"
        if len(prompt) > longest:
            return f"the prompt has {len(prompt)} tokens, of which at most {longest} fit"
        return None

    def _seats(self, seated: list[Assignment], prompts, numbers, size: int) -> Seats:
        """The assignments as columns of `size`; missing rows go to slot number B, which is none.

        prompts: what follows the prefix.
        """
        own = [prompts[one.index] for one in seated]
        prefix = len(self.settings.prefix)
        most, room = self.settings.max_new_tokens, self.config.max_seq_len - prefix
        return Seats(
            slot=_column([one.slot for one in seated], size, missing=self.settings.slots),
            last=_column([prompt[-1] for prompt in own], size),
            position=_column([prefix + len(prompt) - 1 for prompt in own], size),
            limit=_column([min(most, room + 1 - len(prompt)) for prompt in own], size),
            example=_column([numbers[one.index] for one in seated], size),
        )

    def _tokens(self, seated: list[Assignment], prompts, bucket: int) -> np.ndarray:
        """The prompts of one admission, padded: [R, P]."""
        tokens = np.zeros((self.settings.prefill_batch, bucket), np.int32)
        for row, one in zip(tokens, seated, strict=False):
            row[: len(prompts[one.index])] = prompts[one.index]
        self._count(
            prompts=len(seated),
            prompt_tokens=sum(len(prompts[one.index]) for one in seated),
            padded_tokens=tokens.size,
        )
        return tokens

    def _count(self, **more: int) -> None:
        changed = {name: getattr(self.work, name) + value for name, value in more.items()}
        self.work = dataclasses.replace(self.work, **changed)

    def _begun(
        self, logprobs: bool, params: dict, adapter: Adapter | None, prefix: jax.Array
    ) -> State:
        state = self._empty_state(logprobs)
        return steps.begin(params, adapter, state, prefix, config=self.config)

    def _empty_state(self, logprobs: bool) -> State:
        return empty_state(
            self.config,
            slots=self.settings.slots,
            cached=self.cached,
            max_new_tokens=self.settings.max_new_tokens,
            dtype=self.compute_dtype,
            logprobs=logprobs,
        )


def _completion(seen: dict, slot: int, stop_strings: StopStrings | None) -> Completion:
    """What one slot has produced so far."""
    count, stopped, text = int(seen["count"][slot]), bool(seen["stopped"][slot]), None
    tokens = tuple(seen["produced"][slot, :count].tolist())
    if stop_strings is not None:
        count, text, cut = stop_strings.cut(tokens)
        stopped |= cut
    logprobs = seen["logprobs"]
    return Completion(
        tokens=tokens[:count],
        stopped=stopped,
        logprobs=None if logprobs is None else tuple(logprobs[slot, :count].tolist()),
        text=text,
    )


def _column(values: Sequence[int], size: int, *, missing: int = 0) -> np.ndarray:
    column = np.full(size, missing, np.int32)
    column[: len(values)] = values
    return column
