"""How transformers' own `generate` begins its answers, beside those that `sdjax eval --out` kept.

    python benchmarks/evaluation/beginnings.py MODEL math math500.jsonl scores/model

Greedy, float32, on the same prompts; "empty" is an answer that ends with its first token. The
number is the gap of the two highest logits there.
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
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    for line in read_results(Path(options.results)):
        tokens = tokenizer(plain_prompt(task, problems[line.id]), return_tensors="pt")
        found = model.generate(
            **tokens,
            do_sample=False,
            max_new_tokens=TOKENS,
            output_scores=True,
            return_dict_in_generate=True,
        )
        first, second = found.scores[0][0].topk(2).values.tolist()
        new = found.sequences[0, tokens.input_ids.shape[1] :]
        theirs = tokenizer.decode(new, skip_special_tokens=True)
        same = line.output.startswith(theirs) and bool(line.output) == bool(theirs)
        told = "same" if same else "other"
        print(f"{line.id}: {told}, {theirs or 'empty'!r}, {first - second:.2f}", flush=True)


if __name__ == "__main__":
    main()
