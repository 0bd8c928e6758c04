"""Batched decoding with a fixed number of slots and continuous refilling.

`prefill_prefix` computes the tokens that all prompts share, `prefill` computes a few prompts of one
bucket and starts their sequences in free slots, `fork` starts further samples of a prompt by
copying its cache, and `decode_round` generates tokens in all slots until enough of them are free
again. `prefill` compiles once per bucket, the others once. The weights are arguments, so another
model with the same shapes compiles nothing.

Axes: see `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Key

from sdjax.core.errors import UserError
from sdjax.decoding import steps
from sdjax.decoding.config import DecoderConfig, check_cache_memory
from sdjax.decoding.results import Completion, DecodeStats
from sdjax.decoding.sampling import Sampling
from sdjax.decoding.schedule import Assignment, Schedule
from sdjax.decoding.state import DecodeState, NewSequences, init_state, state_sharding
from sdjax.decoding.stopping import StopStrings
from sdjax.io.tokenizer import Tokenizer
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.types import Params

# Steps between two searches for stop strings in the generated text.
_STEPS_PER_STOP_CHECK = 16


class Decoder:
    """Text generator for any weights of one model config.

    The compiled executables depend only on the shapes, so one decoder serves the seed model, its
    experts and all merges of them. A sequence does not depend on the rest of the batch.

    Attributes:
        model_config: config of the models.
        config: sizes that the decoder is compiled for.
        tokenizer: tokenizer used by `generate`, or None.
        compute_dtype: dtype of activations and KV cache.
        stats: amount of computation in the last call of `decode` or `generate`.

    Examples:
        >>> import sdjax
        >>> config, params = sdjax.load_model("zoo:seed")
        >>> decoder = sdjax.Decoder(config, tokenizer=sdjax.load_tokenizer("zoo:seed"))
        >>> (completion,) = decoder.generate(params, ["12+34="])
        >>> completion.text
        '46'
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: DecoderConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        stop_token_ids: Sequence[int] | None = None,
        compute_dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
    ):
        """Create a decoder; compilation happens at first use.

        Args:
            model_config: config of the models.
            config: sizes to compile for; by default those of `DecoderConfig` with 8 slots.
            tokenizer: tokenizer for `generate`; `decode` does not need one.
            stop_token_ids: tokens that end a sequence; by default the tokenizer's, or without a
                tokenizer those of the model config.
            compute_dtype: dtype of activations and KV cache; weights are cast once per call. By
                default float32 on CPUs, where bfloat16 is slower, and bfloat16 elsewhere.
            mesh: devices to decode on; slots are sharded over the `data` axis, the heads of the
                KV cache over `tensor`.

        Raises:
            UserError: the KV cache alone exceeds the memory of the devices.
        """
        if config is None:
            config = DecoderConfig(slots=8, prefill_batch=8)
        if stop_token_ids is None:
            stop_token_ids = tokenizer.eos_ids if tokenizer else model_config.eos_token_ids
        if compute_dtype is None:
            compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.model_config = model_config
        self.config = config
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.stats = DecodeStats()
        self._stop_token_ids = jnp.asarray(stop_token_ids, jnp.int32)
        prefix_length = len(config.prefix)
        # The newest token of a sequence is not in the cache.
        self._cache_length = min(
            prefix_length + config.buckets[-1] + config.max_new_tokens - 1,
            model_config.max_seq_len,
        )
        itemsize, devices = jnp.dtype(compute_dtype).itemsize, 1 if mesh is None else mesh.size
        check_cache_memory(model_config, config, self._cache_length, itemsize, devices)
        sharding, replicated = None, None
        if mesh is not None:
            sharding = state_sharding(jax.eval_shape(partial(self._init_state, True)), mesh)
            # Every process reads these arrays, so they must not be sharded.
            replicated = NamedSharding(mesh, PartitionSpec())
        jit = partial(jax.jit, donate_argnames="state")
        self._prefill_prefix = jax.jit(
            self._init_with_prefix, static_argnums=0, out_shardings=sharding
        )
        self._prefill = jit(
            partial(steps.prefill, config=model_config, prefix_length=prefix_length),
            out_shardings=sharding,
        )
        self._fork = jit(steps.fork, out_shardings=sharding)
        self._decode_round = jit(
            partial(steps.decode_round, config=model_config),
            static_argnames="top_k",
            out_shardings=None if mesh is None else (sharding, replicated),
        )
        self._cast = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(compute_dtype), params))

    def generate(
        self,
        params: Params,
        prompts: Sequence[str],
        *,
        adapter: Adapter | None = None,
        sampling: Sampling | None = None,
        key: Key[Array, ""] | None = None,
        sample_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete text prompts; the results include `text` and keep the order of the prompts.

        Args:
            params: nested dict of the model's parameters ([out, in] matrices, see
                `sdjax.models.params`), in any float dtype.
            prompts: texts, wrapped in the tokenizer's chat template if it has one.
            adapter: LoRA adapter or None.
            sampling: sampling parameters; greedy by default.
            key: typed PRNG key for sampling; `jax.random.key(0)` by default.
            sample_ids: ids folded into the random keys, as in `decode`.
            stop: strings at which a text ends.
            logprobs: whether to return log-probabilities.
            on_completion: called with index and completion as soon as a sequence is finished.

        Returns:
            one completion per prompt: its text, and its [new tokens] token ids and, on request,
            float32 log-probabilities.

        Raises:
            UserError: the decoder has no tokenizer, a prompt is too long, or an argument is not of
                the kind described above.

        Examples:
            >>> import jax, sdjax
            >>> from sdjax.decoding.sampling import Sampling
            >>> config, params = sdjax.load_model("zoo:seed")
            >>> decoder = Decoder(config, tokenizer=sdjax.load_tokenizer("zoo:seed"))
            >>> sampling = Sampling(temperature=0.8, top_p=0.95)
            >>> samples = decoder.generate(
            ...     params, ["7+8="] * 3, sampling=sampling, key=jax.random.key(1)
            ... )
            >>> len(samples)
            3
        """
        if isinstance(prompts, str):
            raise UserError("generate: prompts must be a list of texts; pass [prompt]")
        if not isinstance(params, Mapping):
            raise UserError(
                f"generate: params must be a nested dict of arrays, not {type(params).__name__}; "
                "of a merge, pass merged.params"
            )
        if self.tokenizer is None:
            raise UserError("generate needs a tokenizer: pass tokenizer=... to Decoder")
        decode = self.tokenizer.decode
        tokens = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        for index, prompt in enumerate(tokens):
            failure = self._failure(prompt)
            if failure is not None:
                raise UserError(f"generate: prompt {index}: {failure}")

        def with_text(completion: Completion) -> Completion:
            if completion.text is not None:
                return completion
            return dataclasses.replace(completion, text=decode(completion.tokens))

        def report(index: int, completion: Completion) -> None:
            if on_completion is not None:
                on_completion(index, with_text(completion))

        completions = self.decode(
            params,
            adapter,
            tokens,
            sampling=sampling,
            key=key,
            sample_ids=sample_ids,
            stop_strings=StopStrings(strings=tuple(stop), decode=decode) if stop else None,
            logprobs=logprobs,
            on_completion=report,
        )
        return [with_text(completion) for completion in completions]

    def decode(
        self,
        params: Params,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling | None = None,
        key: Key[Array, ""] | None = None,
        sample_ids: Sequence[int] | None = None,
        stop_strings: StopStrings | None = None,
        logprobs: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete prompts given as token ids; the results keep the order of the prompts.

        Sampled tokens depend only on `key`, the sample id and the position. A prompt that occurs
        several times is prefilled once, and each occurrence is a separate sample. A prompt that is
        empty, or longer than the largest bucket or the context, yields a completion with a
        `failure`. Sequences never exceed the context: a prompt that fills it gets one new token.

        Args:
            params: parameters of the model, in any float dtype.
            adapter: LoRA adapter or None.
            prompts: token ids of each prompt.
            sampling: sampling parameters; greedy by default.
            key: typed PRNG key for sampling; `jax.random.key(0)` by default.
            sample_ids: ids folded into the random keys; the indices of the prompts by default.
            stop_strings: strings that end a sequence, in addition to the stop tokens.
            logprobs: whether to return log-probabilities.
            on_completion: called with index and completion as soon as a sequence is finished.

        Returns:
            one completion per prompt, with [new tokens] token ids and, on request, float32
            log-probabilities of the same length.
        """
        sampling = sampling or Sampling()
        round_args = {
            "key": jax.random.key(0) if key is None else key,
            "sampling_params": sampling.scalar_params(),
            "top_k": None if sampling.greedy else sampling.top_k,
            "stop_token_ids": self._stop_token_ids,
        }
        sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        self.stats = DecodeStats()
        completions: dict[int, Completion] = {}
        for index, completion in self._completions(
            params, adapter, prompts, sample_ids, round_args, stop_strings, logprobs
        ):
            completions[index] = completion
            if on_completion is not None:
                on_completion(index, completion)
        return [completions[index] for index in range(len(prompts))]

    def _completions(
        self,
        params: Params,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        round_args: Mapping[str, Any],
        stop_strings: StopStrings | None,
        logprobs: bool,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the index and completion of every prompt, in the order in which they finish."""
        suffixes = {}
        for index, prompt in enumerate(prompts):
            failure = self._failure(prompt)
            if failure is None:
                suffixes[index] = prompt[len(self.config.prefix) :]
            else:
                yield index, Completion(failure=failure)
        if not suffixes:
            return
        slots, prefill_batch = self.config.slots, self.config.prefill_batch
        schedule = Schedule(suffixes, self.config.buckets, slots=slots, prefill_batch=prefill_batch)
        if any(leaf.dtype != self.compute_dtype for leaf in jax.tree.leaves(params)):
            params = self._cast(params)
        prefix = np.array(self.config.prefix, np.int32)
        state = self._prefill_prefix(logprobs, params, adapter, prefix)
        max_steps = np.int32(_STEPS_PER_STOP_CHECK if stop_strings else np.iinfo(np.int32).max)
        while schedule.has_unfinished:
            for bucket, assignments in schedule.fill():
                if bucket is None:
                    new = self._new_sequences(assignments, suffixes, sample_ids, slots)
                    source_slots = _padded([a.source_slot or 0 for a in assignments], slots)
                    state = self._fork(state, new=new, source_slots=source_slots)
                else:
                    new = self._new_sequences(assignments, suffixes, sample_ids, prefill_batch)
                    tokens = self._padded_prompts(assignments, suffixes, bucket)
                    state = self._prefill(params, adapter, state, tokens=tokens, new=new)
            state, outputs = self._decode_round(
                params,
                adapter,
                state,
                occupied=np.array([owner is not None for owner in schedule.owners]),
                max_active=np.int32(slots - schedule.min_free_slots),
                max_steps=max_steps,
                **round_args,
            )
            outputs = jax.device_get(outputs)
            self._add_stats(steps=int(outputs["steps"]), slot_steps=int(outputs["steps"]) * slots)
            for slot, owner in enumerate(schedule.owners):
                active = outputs["active"][slot]
                if owner is None or (active and not stop_strings):
                    continue
                completion = _completion(outputs, slot, stop_strings)
                if completion.stopped or not active:
                    schedule.release(slot)
                    new_tokens = outputs["num_tokens"][slot] + outputs["stopped"][slot]
                    self._add_stats(new_tokens=int(new_tokens))
                    yield owner, completion

    def _failure(self, prompt: Sequence[int]) -> str | None:
        """Return the reason why a prompt cannot be decoded, or None."""
        prefix, vocab_size = self.config.prefix, self.model_config.vocab_size
        max_length = min(len(prefix) + self.config.buckets[-1], self.model_config.max_seq_len)
        if not len(prompt):
            return "the prompt is empty: a model needs at least one token"
        lowest, highest = min(prompt), max(prompt)
        if lowest < 0 or highest >= vocab_size:
            return (
                f"token {highest if lowest >= 0 else lowest} is outside the model's vocabulary of "
                f"{vocab_size} tokens: the tokenizer belongs to another model"
            )
        if tuple(prompt[: len(prefix)]) != prefix or len(prompt) == len(prefix):
            return "the prompt does not extend the decoder's prefix"
        if len(prompt) > max_length:
            return f"the prompt has {len(prompt)} tokens, more than the maximum of {max_length}"
        return None

    def _new_sequences(
        self,
        assignments: Sequence[Assignment],
        suffixes: Mapping[int, Sequence[int]],
        sample_ids: Sequence[int],
        size: int,
    ) -> NewSequences:
        """Return the assigned sequences as arrays, padded to `size` rows.

        Args:
            assignments: sequences and their slots.
            suffixes: sequence index -> tokens of its prompt after the prefix.
            sample_ids: id of each sequence.
            size: number of rows.
        """
        prompts = [suffixes[assignment.index] for assignment in assignments]
        prefix_length = len(self.config.prefix)
        available = self.model_config.max_seq_len - prefix_length + 1
        max_tokens = [
            min(self.config.max_new_tokens, available - len(prompt)) for prompt in prompts
        ]
        return NewSequences(
            slot=_padded([a.slot for a in assignments], size, fill=self.config.slots),
            last_token=_padded([prompt[-1] for prompt in prompts], size),
            position=_padded([prefix_length + len(prompt) - 1 for prompt in prompts], size),
            max_tokens=_padded(max_tokens, size),
            sample_id=_padded([sample_ids[a.index] for a in assignments], size),
        )

    def _padded_prompts(
        self, assignments: Sequence[Assignment], suffixes: Mapping[int, Sequence[int]], bucket: int
    ) -> np.ndarray:
        """Return the tokens of one prefill call, [prefill_batch bucket] int32."""
        prompts = [suffixes[assignment.index] for assignment in assignments]
        tokens = np.zeros((self.config.prefill_batch, bucket), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        self._add_stats(
            prompts=len(prompts),
            prompt_tokens=sum(map(len, prompts)),
            padded_tokens=tokens.size,
        )
        return tokens

    def _add_stats(self, **increments: int) -> None:
        totals = {name: getattr(self.stats, name) + n for name, n in increments.items()}
        self.stats = dataclasses.replace(self.stats, **totals)

    def _init_with_prefix(
        self,
        logprobs: bool,
        params: Params,
        adapter: Adapter | None,
        prefix: Int[Array, " time"],
    ) -> DecodeState:
        state = self._init_state(logprobs)
        return steps.prefill_prefix(params, adapter, state, prefix, config=self.model_config)

    def _init_state(self, logprobs: bool) -> DecodeState:
        return init_state(
            self.model_config,
            slots=self.config.slots,
            cache_length=self._cache_length,
            max_new_tokens=self.config.max_new_tokens,
            dtype=self.compute_dtype,
            logprobs=logprobs,
        )


def _completion(
    outputs: Mapping[str, Any], slot: int, stop_strings: StopStrings | None
) -> Completion:
    """Return the completion of one slot so far."""
    count, stopped, text = int(outputs["num_tokens"][slot]), bool(outputs["stopped"][slot]), None
    tokens = tuple(outputs["tokens"][slot, :count].tolist())
    if stop_strings is not None:
        count, text, truncated = stop_strings.truncate(tokens)
        stopped |= truncated
    logprobs = outputs["logprobs"]
    return Completion(
        tokens=tokens[:count],
        stopped=stopped,
        logprobs=None if logprobs is None else tuple(logprobs[slot, :count].tolist()),
        text=text,
    )


def _padded(values: Sequence[int], size: int, *, fill: int = 0) -> np.ndarray:
    column = np.full(size, fill, np.int32)
    column[: len(values)] = values
    return column
