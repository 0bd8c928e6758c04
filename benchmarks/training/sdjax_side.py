"""The sdjax side of `compare.py`: six DPO steps, full or LoRA, or twenty SFT steps.

`python sdjax_side.py full|lora|sft --work DIR --model MODEL [--adapter PEFT_FOLDER]` writes
DIR/sdjax-KIND.npz: losses, seconds and log-probabilities of each step, the first gradient, the
compilation time in seconds, and the peak memory of the process in bytes. The kind `adapter` writes
a new adapter of rank 16 to the PEFT folder; both sides start from it.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.jsonl import read_jsonl
from sdjax.io.peft import read_adapter, write_adapter
from sdjax.io.tokenizer import load_tokenizer
from sdjax.models.lora import init_adapter
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten
from sdjax.training.config import DPOConfig, OptimizerConfig
from sdjax.training.dpo import (
    TokenPair,
    dpo_loss,
    pad_pairs,
    reference_logprobs,
    sequence_logprobs,
)
from sdjax.training.fit import compile_step
from sdjax.training.packing import Example, pack, target_batches
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import Trainable, full_finetune, lora_finetune
from sdjax.xla.allocator import restart_with_huge_pages

BATCH, LENGTH = 4, 256
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, max_steps=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["full", "lora", "sft", "adapter"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    options = parser.parse_args()
    config = load_config(options.model)
    if options.kind == "adapter":
        adapter = init_adapter(config, jax.random.key(0), rank=16, alpha=32)
        write_adapter(options.adapter, config, adapter, base=str(options.model))
        return
    tokenizer = load_tokenizer(options.model)

    def example(prompt: str, target: str) -> Example:
        return Example(
            prompt=tuple(tokenizer.encode(prompt, add_special=True)),
            target=(*tokenizer.encode(target, add_special=False), *tokenizer.eos_ids[:1]),
        )

    def load_trainable() -> Trainable:
        _, params = load_model(options.model, dtype=jnp.float32)
        if options.adapter is None:
            return full_finetune(config, params)
        adapter = read_adapter(options.adapter, config, model=options.model)
        return lora_finetune(config, params, adapter)

    trainable = load_trainable()
    settings = DPOConfig(beta=0.1, learning_rate=1e-4, batch_size=BATCH, max_steps=6)
    if options.kind == "sft":
        texts = read_jsonl(options.work / "texts.jsonl", ("prompt", "completion"))
        rows = [example(row["prompt"], row["completion"]) for _, row in texts]
        # One example per row, as in TRL's default collator.
        data = pack_separately(rows)
        loss = sft_loss(config, trainable.assemble)
    else:
        stored = read_jsonl(options.work / "pairs.jsonl", ("prompt", "chosen", "rejected"))
        pairs = [
            TokenPair(
                chosen=example(row["prompt"], row["chosen"]),
                rejected=example(row["prompt"], row["rejected"]),
            )
            for _, row in stored
        ]
        data = pad_pairs(pairs, LENGTH)
        data["reference"] = reference_logprobs(trainable, data, settings)
        loss = dpo_loss(config, trainable.assemble, settings)
    indices = [np.arange(at, at + BATCH) for at in range(0, len(data["tokens"]), BATCH)]
    first, *_ = batches = list(target_batches(data, indices))
    gradient = {}
    if options.kind != "sft":
        gradients = jax.jit(jax.grad(loss, has_aux=True))(
            trainable.trainable, trainable.frozen, first
        )[0]
        gradient = {hf_name(config, path): np.asarray(x) for path, x in flatten(gradients).items()}
        del gradients
    jax.clear_caches()
    init, step = compile_step(loss, OPTIMIZER)
    params, opt_state = trainable.trainable, init(trainable.trainable)
    start = time.perf_counter()
    compiled = step.lower(params, opt_state, trainable.frozen, first).compile()
    compilation = time.perf_counter() - start
    losses, times = [], []
    for batch in batches:
        start = time.perf_counter()
        params, opt_state, metrics = compiled(params, opt_state, trainable.frozen, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(params)
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logprobs = []
    if options.kind != "sft":
        # In a second pass, because running another executable between steps returns memory to the
        # system, and the next step then takes 25% longer to allocate it again.
        del params, opt_state
        trainable = load_trainable()
        params, opt_state = trainable.trainable, init(trainable.trainable)
        compute_logprobs = jax.jit(
            lambda params, frozen, batch: sequence_logprobs(
                config, *trainable.assemble(params, frozen), batch
            )
        )
        for batch, loss_before in zip(batches, losses, strict=True):
            logprobs.append(np.asarray(compute_logprobs(params, trainable.frozen, batch)))
            params, opt_state, metrics = compiled(params, opt_state, trainable.frozen, batch)
            assert float(metrics["loss"]) == loss_before
    np.savez(
        options.work / f"sdjax-{options.kind}.npz",
        losses=losses,
        times=times,
        logprobs=np.array(logprobs),
        compilation=compilation,
        memory=memory,
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        versions=json.dumps({"jax": jax.__version__}),
        **{f"gradient/{name}": value for name, value in gradient.items()},
    )
    print(options.kind, "times", times, "losses", losses, "compilation", compilation)


def pack_separately(rows: list[Example]) -> dict[str, np.ndarray]:
    packed = [pack([row], LENGTH) for row in rows]
    return {name: np.concatenate([arrays[name] for arrays in packed]) for name in packed[0]}


def hf_name(config, path: str) -> str:
    """Return the name in torch's `named_parameters`; LoRA factors have PEFT's prefix and suffix."""
    specs = param_specs(config)
    if path in specs:
        return specs[path].hf_name
    projection, factor = path.rsplit("/", 1)
    module = specs[projection].hf_name.removesuffix(".weight")
    return f"base_model.model.{module}.lora_{factor.upper()}.default.weight"


if __name__ == "__main__":
    restart_with_huge_pages()  # as `sdjax train` does
    main()
