"""sdjax's side of `compare.py`: one process a job, a line of JSON at the end."""

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

compiled: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    print(json.dumps(JOBS[options.job](options.model, options.data)))


class Clock:
    """Seconds in each of a decoder's programs, waited for, compilation included."""

    def __init__(self, decoder: Decoder):
        self.seconds = {"_begin": 0.0, "_admit": 0.0, "_advance": 0.0}
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
    settings = DecoderConfig(slots=32, prefill_batch=8, buckets=(longest,), max_new_tokens=128)
    decoder = Decoder(config, settings, stop_token_ids=load_tokenizer(model).eos_ids)
    found = decoder.decode(params, None, prompts)
    programs = len(compiled)
    backwards = decoder.decode(params, None, prompts[::-1])[::-1]
    other = jax.tree.map(lambda leaf: leaf * 1.01, params)
    before = len(compiled)
    decoder.decode(other, None, prompts[:8])
    return {
        "tokens": [list(one.tokens) for one in found],
        "order matters to": sum(a != b for a, b in zip(found, backwards, strict=True)),
        "programs compiled first": programs,
        "programs compiled for other weights": len(compiled) - before,
        "decoder programs": [
            decoder._begin._cache_size(),
            decoder._admit._cache_size(),
            decoder._advance._cache_size(),
        ],
    }


def fixed(model: str, data: str) -> dict:
    config, params = load_model(model, dtype=np.float32)
    prompts = fixed_prompts()
    settings = DecoderConfig(slots=32, prefill_batch=32, buckets=(140,), max_new_tokens=64)
    decoder = Decoder(config, settings, stop_token_ids=())
    decoder.decode(params, None, prompts)
    clock = Clock(decoder)
    rows = []
    for _ in range(3):
        clock.seconds.update(dict.fromkeys(clock.seconds, 0.0))
        decoder.decode(params, None, prompts)
        rows.append(
            {
                "prefill": 32 * 140 / clock.seconds["_admit"],
                "decode": 32 * 64 / clock.seconds["_advance"],
            }
        )
    return {"rows": rows, "compilation": sum(compiled)}


def evaluation(model: str, data: str) -> dict:
    config, params = load_model(model)
    tokenizer = load_tokenizer(model)
    prompts = chat(model, svamp(data)[:256])
    settings = fit_decoder_config(config, prompts, 128)
    decoder = Decoder(config, settings, stop_token_ids=tokenizer.eos_ids)
    clock = Clock(decoder)
    found = decoder.decode(params, None, prompts)
    texts = [tokenizer.decode(one.tokens) for one in found]
    whole, work = time.perf_counter() - START, decoder.work
    return {
        "seconds": whole,
        "mean output": float(np.mean([len(one.tokens) + one.stopped for one in found])),
        "characters": sum(map(len, texts)),
        "slots": settings.slots,
        "rows": settings.prefill_batch,
        "prefix": len(settings.prefix),
        "buckets": settings.buckets,
        "occupancy": work.occupancy,
        "steps": work.steps,
        "prefill share": clock.seconds["_admit"] / whole,
        "decoding share": clock.seconds["_advance"] / whole,
        "padding share of prefill": 1 - work.prompt_tokens / work.padded_tokens,
        "compilation share": sum(compiled) / whole,
        "programs": len(compiled),
    }


JOBS = {"greedy": greedy, "fixed": fixed, "evaluation": evaluation}

if __name__ == "__main__":
    assert jnp.ones(1).dtype == jnp.float32
    main()
