"""Sample 200 candidates from a generator with the `full` prompt and judge them in the sandbox.

    python benchmarks/training/candidates.py MODEL --warmstart WARM --out FILE.json

MODEL is sampled at temperature 1.0. WARM is a folder written by `sdjax train warmstart`; the
samples are compared with its training programs. Run this on the model before and after the warm
start.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.sampling import Sampling
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import TRAINING_PROGRAMS, model_folder
from sdjax.io.tokenizer import load_tokenizer
from sdjax.merging.engine import default_slots
from sdjax.programs.extraction import extract_source
from sdjax.programs.signature import model_signature
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import is_admissible
from sdjax.training.warmstart import make_warmstart_data

EXPERTS = (
    "solves grade-school word problems step by step",
    "follows instructions and explains what it does",
    "solves equations and proves theorems",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--warmstart", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    folder = model_folder(options.model)
    config, params = load_model(folder)
    tokenizer = load_tokenizer(folder)
    prompt = list(make_warmstart_data(tokenizer, "full", EXPERTS, ()).prompt)
    settings = DecoderConfig(slots=40, prefill_batch=1, buckets=(len(prompt),), max_new_tokens=208)
    decoder = Decoder(config, settings, stop_token_ids=tokenizer.eos_ids)
    start = time.perf_counter()
    completions = decoder.decode(
        params,
        None,
        [prompt] * options.samples,
        sampling=Sampling(temperature=1.0),
        key=jax.random.key(0),
    )
    seconds = time.perf_counter() - start
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    sources = [extract_source(text) for text in texts]
    candidates = [source for source in sources if source is not None]
    with Sandbox(model_signature(config, default_slots(len(EXPERTS)), "mlp")) as sandbox:
        verdicts = [verdict for _, verdict in sandbox.judge_all(candidates)]
    identities = {verdict.identity for verdict in verdicts if verdict.admitted and verdict.identity}
    training = set(np.load(options.warmstart / TRAINING_PROGRAMS, allow_pickle=False).tolist())
    admissible = sum(is_admissible(verdict.verdict) for verdict in verdicts)
    results = {
        "samples": len(texts),
        "candidates": len(candidates),
        "admissible": admissible,
        "identities": len(identities),
        "not in training": sum(int(identity[:16], 16) not in training for identity in identities),
        "seconds": seconds,
    }
    print(json.dumps(results))
    options.out.write_text(json.dumps({"results": results, "texts": texts}, indent=1))


if __name__ == "__main__":
    main()
