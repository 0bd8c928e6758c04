"""The transformers side of `compare.py`: runs one job and prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import time

START = time.perf_counter()

import torch  # noqa: E402
from problems import chat, fixed_prompts, gsm8k, svamp  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("NUMBER", "OF"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    with torch.inference_mode():
        print(json.dumps(JOBS[options.job](model, options)))


def generate(model, prompts: list[list[int]], **settings):
    """Run transformers' `generate` greedily, with left padding."""
    pad = model.generation_config.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return longest, model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )


def greedy(model, options) -> dict:
    prompts = chat(options.model, gsm8k(options.data)[:64])
    tokens, gaps = [], []
    for start in range(0, len(prompts), 16):
        longest, found = generate(
            model, prompts[start : start + 16], max_new_tokens=128, output_logits=True
        )
        tokens += found.sequences[:, longest:].tolist()
        best = torch.stack([logits.topk(2).values for logits in found.logits], 1)  # [B, M, 2]
        gaps += (best[..., 0] - best[..., 1]).tolist()
    return {"tokens": tokens, "gaps": gaps, "stop": model.generation_config.eos_token_id}


def fixed(model, options) -> dict:
    prompts = fixed_prompts()
    model.generation_config.eos_token_id = None
    rows = []
    for turn in range(4):
        seconds = {}
        for new_tokens in (1, 64):
            start = time.perf_counter()
            generate(model, prompts, max_new_tokens=new_tokens)
            seconds[new_tokens] = time.perf_counter() - start
        if turn:  # the first run is a warm-up
            decode = seconds[64] - seconds[1]
            rows.append({"prefill": 32 * 140 / seconds[1], "decode": 32 * 63 / decode})
    return {"rows": rows}


def evaluation(model, options) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    prompts = sorted(chat(options.model, svamp(options.data)[:256]), key=len)
    batches = [prompts[at : at + options.batch] for at in range(0, 256, options.batch)]
    ready = time.perf_counter()
    produced, characters, steps = 0, 0, 0
    number, parts = options.part
    for batch in batches[number::parts]:
        longest, found = generate(model, batch, max_new_tokens=128)
        new = found.sequences[:, longest:]
        ends = new == model.generation_config.eos_token_id
        produced += int((ends.cumsum(1) - ends.int() == 0).sum())
        steps += new.numel()
        characters += sum(map(len, tokenizer.batch_decode(new, skip_special_tokens=True)))
    return {
        "start": ready - START,
        "generate": time.perf_counter() - ready,
        "produced": produced,
        "steps": steps,
        "characters": characters,
    }


JOBS = {"greedy": greedy, "fixed": fixed, "evaluation": evaluation}

if __name__ == "__main__":
    main()
