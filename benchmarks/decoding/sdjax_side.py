"""The sdjax side of `compare.py`: runs one job and prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import time

START = time.perf_counter()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from problems import chat, fixed_prompts, gsm8k, svamp  # noqa: E402

from sdjax.decoding.config import DecoderConfig, fit_decoder_config  # noqa: E402
from sdjax.decoding.decoder import Decoder  # noqa: E402
from sdjax.io.hf_checkpoint import load_model  # noqa: E402
from sdjax.io.tokenizer import load_tokenizer  # noqa: E402

compile_seconds: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compile_seconds.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    print(json.dumps(JOBS[options.job](options.model, options.data)))


class Clock:
    """Clock of the seconds spent in each compiled function of a decoder, including compilation."""

    def __init__(self, decoder: Decoder):
        self.seconds = {"_prefill_prefix": 0.0, "_prefill": 0.0, "_decode_round": 0.0}
        for name in self.seconds:
            setattr(decoder, name, self._timed(name, getattr(decoder, name)))

    def _timed(self, name, function):
        def run(*args, **kwargs):
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args, **kwargs))
            self.seconds[name] += time.perf_counter() - start
            return result

        return run


def greedy(model: str, data: str) -> dict:
    config, params = load_model(model)
    prompts = chat(model, gsm8k(data)[:64])
    longest = -(-max(map(len, prompts)) // 16) * 16
    sizes = DecoderConfig(slots=32, prefill_batch=8, buckets=(longest,), max_new_tokens=128)
    decoder = Decoder(config, sizes, stop_token_ids=load_tokenizer(model).eos_ids)
    completions = decoder.decode(params, None, prompts)
    executables = len(compile_seconds)
    reversed_batch = decoder.decode(params, None, prompts[::-1])[::-1]
    scaled = jax.tree.map(lambda leaf: leaf * 1.01, params)
    before = len(compile_seconds)
    decoder.decode(scaled, None, prompts[:8])
    return {
        "tokens": [list(completion.tokens) for completion in completions],
        "sequences that depend on the order": sum(
            a != b for a, b in zip(completions, reversed_batch, strict=True)
        ),
        "executables compiled": executables,
        "executables compiled for other weights": len(compile_seconds) - before,
        "executables of the decoder": [
            decoder._prefill_prefix._cache_size(),
            decoder._prefill._cache_size(),
            decoder._decode_round._cache_size(),
        ],
    }


def fixed(model: str, data: str) -> dict:
    config, params = load_model(model, dtype=np.float32)
    prompts = fixed_prompts()
    sizes = DecoderConfig(slots=32, prefill_batch=32, buckets=(140,), max_new_tokens=64)
    decoder = Decoder(config, sizes, stop_token_ids=())
    decoder.decode(params, None, prompts)
    clock = Clock(decoder)
    rows = []
    for _ in range(3):
        clock.seconds.update(dict.fromkeys(clock.seconds, 0.0))
        decoder.decode(params, None, prompts)
        rows.append(
            {
                "prefill": 32 * 140 / clock.seconds["_prefill"],
                "decode": 32 * 64 / clock.seconds["_decode_round"],
            }
        )
    return {"rows": rows, "compilation": sum(compile_seconds)}


def evaluation(model: str, data: str) -> dict:
    config, params = load_model(model)
    tokenizer = load_tokenizer(model)
    prompts = chat(model, svamp(data)[:256])
    sizes = fit_decoder_config(config, prompts, 128)
    decoder = Decoder(config, sizes, stop_token_ids=tokenizer.eos_ids)
    clock = Clock(decoder)
    completions = decoder.decode(params, None, prompts)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    total, stats = time.perf_counter() - START, decoder.stats
    return {
        "seconds": total,
        "mean output": float(
            np.mean([len(completion.tokens) + completion.stopped for completion in completions])
        ),
        "characters": sum(map(len, texts)),
        "slots": sizes.slots,
        "prefill_batch": sizes.prefill_batch,
        "prefix": len(sizes.prefix),
        "buckets": sizes.buckets,
        "occupancy": stats.occupancy,
        "steps": stats.steps,
        "prefill share": clock.seconds["_prefill"] / total,
        "decoding share": clock.seconds["_decode_round"] / total,
        "padding share of prefill": 1 - stats.prompt_tokens / stats.padded_tokens,
        "compilation share": sum(compile_seconds) / total,
        "executables": len(compile_seconds),
    }


JOBS = {"greedy": greedy, "fixed": fixed, "evaluation": evaluation}

if __name__ == "__main__":
    assert jnp.ones(1).dtype == jnp.float32
    main()
