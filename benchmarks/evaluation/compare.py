"""Compare prompts and outputs with lm-evaluation-harness's (see harness_side.py).

python benchmarks/evaluation/compare.py prompts gsm8k gsm8k_test.jsonl HARNESS.json
python benchmarks/evaluation/compare.py outputs scores/model HARNESS.json
"""

import argparse
import json
from pathlib import Path

from sdjax.evaluation.prompts import plain_prompt
from sdjax.evaluation.results import METRICS, read_results
from sdjax.evaluation.tasks.registry import find_task


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prompts", "outputs"])
    parser.add_argument("arguments", nargs="+", metavar="TASK DATA HARNESS | RESULTS HARNESS")
    options = parser.parse_args()
    *inputs, path = options.arguments
    reference = json.loads(Path(path).read_text(encoding="utf-8"))
    if options.what == "prompts":
        prompts(*inputs, reference)
    else:
        outputs(Path(*inputs), reference)


def prompts(name: str, data: str, reference: list[str]) -> None:
    task = find_task(name, data=data, development=0)
    ours = [plain_prompt(task, problem) for problem in task.problems("test")]
    equal = sum(a == b for a, b in zip(ours, reference, strict=True))
    print(f"{name}: {equal} of {len(reference)} prompts are equal")


def outputs(folder: Path, reference: dict) -> None:
    lines = {line.id.removeprefix("test-"): line for line in read_results(folder)}
    texts = {key.split(" ")[1]: text for key, text in reference["outputs"].items()}
    both = sorted(lines.keys() & texts.keys(), key=int)
    same = [id for id in both if lines[id].output == texts[id]]
    print(f"{len(both)} problems, {len(same)} outputs equal")
    for metric in METRICS:
        correct = sum(getattr(lines[id], metric) for id in both)
        print(f"sdjax, {metric}: {correct} correct")
    for task, metrics in reference["results"].items():
        print(task, {key: value for key, value in metrics.items() if "stderr" not in key})


if __name__ == "__main__":
    main()
