"""Make preference pairs and SFT examples from GSM8K.

`python benchmarks/training/pairs.py GSM8K_TRAIN.jsonl MODEL OUT` writes OUT/pairs.jsonl (prompt,
chosen, rejected) and OUT/texts.jsonl (prompt, completion), each at most 256 tokens long. The
rejected completion is the solution of another problem.
"""

import argparse
import itertools
import json
from pathlib import Path

from sdjax.io.tokenizer import load_tokenizer

NUM_PAIRS, NUM_TEXTS, MAX_LENGTH = 24, 80, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    rows = [json.loads(line) for line in options.problems.read_text().splitlines()]

    def fits(prompt: str, completion: str) -> bool:
        return len(tokenizer.encode(prompt + completion, add_special=True)) < MAX_LENGTH

    pairs, texts = [], []
    for row, other in itertools.pairwise(rows):
        prompt = f"Question: {row['question']}\nAnswer:"
        chosen, rejected = (f" {problem['answer']}" for problem in (row, other))
        if fits(prompt, chosen) and fits(prompt, rejected):
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if fits(prompt, chosen):
            texts.append({"prompt": prompt, "completion": chosen})
    options.out.mkdir(parents=True, exist_ok=True)
    for name, kept in (("pairs", pairs[:NUM_PAIRS]), ("texts", texts[:NUM_TEXTS])):
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        (options.out / f"{name}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
