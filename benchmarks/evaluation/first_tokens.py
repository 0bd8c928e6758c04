"""Compare the first tokens of transformers' `generate` with results of `sdjax eval --out`.

    python benchmarks/evaluation/first_tokens.py MODEL math math500.jsonl scores/model

Both decode the same prompts greedily in float32. "empty" is an answer that ends with its first
token. The number is the gap between the two highest logits at that token.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdjax.evaluation.prompts import plain_prompt
from sdjax.evaluation.results import read_results
from sdjax.evaluation.tasks.registry import find_task

TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "task", "data", "results"):
        parser.add_argument(name)
    options = parser.parse_args()
    task = find_task(options.task, data=options.data, development=0)
    problems = {problem.id: problem for problem in task.problems("test")}
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, trust_remote_code=False
    )
    for line in read_results(Path(options.results)):
        tokens = tokenizer(plain_prompt(task, problems[line.id]), return_tensors="pt")
        output = model.generate(
            **tokens,
            do_sample=False,
            max_new_tokens=TOKENS,
            output_scores=True,
            return_dict_in_generate=True,
        )
        first, second = output.scores[0][0].topk(2).values.tolist()
        new_tokens = output.sequences[0, tokens.input_ids.shape[1] :]
        reference = tokenizer.decode(new_tokens, skip_special_tokens=True)
        same = line.output.startswith(reference) and bool(line.output) == bool(reference)
        label = "same" if same else "different"
        print(f"{line.id}: {label}, {reference or 'empty'!r}, {first - second:.2f}", flush=True)


if __name__ == "__main__":
    main()
