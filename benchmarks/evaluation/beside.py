"""Our side of theirs.py: the same prompts, and the figures of the same problems.

python benchmarks/evaluation/beside.py prompts gsm8k gsm8k_test.jsonl THEIRS.json
python benchmarks/evaluation/beside.py outputs scores/model THEIRS.json
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
    parser.add_argument("arguments", nargs="+", metavar="TASK DATA THEIRS | RESULTS THEIRS")
    options = parser.parse_args()
    *own, path = options.arguments
    theirs = json.loads(Path(path).read_text(encoding="utf-8"))
    if options.what == "prompts":
        prompts(*own, theirs)
    else:
        outputs(Path(*own), theirs)


def prompts(name: str, data: str, theirs: list[str]) -> None:
    task = find_task(name, data=data, development=0)
    ours = [plain_prompt(task, problem) for problem in task.problems("test")]
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {equal} of {len(theirs)} prompts are equal")


def outputs(folder: Path, theirs: dict) -> None:
    lines = {line.id.removeprefix("test-"): line for line in read_results(folder)}
    texts = {key.split(" ")[1]: text for key, text in theirs["outputs"].items()}
    both = sorted(lines.keys() & texts.keys(), key=int)
    same = [id for id in both if lines[id].output == texts[id]]
    print(f"{len(both)} problems, {len(same)} outputs equal")
    for reading in METRICS:
        right = sum(getattr(lines[id], reading) for id in both)
        print(f"ours, {reading}: {right} right")
    for task, metrics in theirs["results"].items():
        print(task, {key: value for key, value in metrics.items() if "stderr" not in key})


if __name__ == "__main__":
    main()
