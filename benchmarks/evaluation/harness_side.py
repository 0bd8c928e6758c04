"""Run lm-evaluation-harness on local files: build prompts, or evaluate with its `hf` model.

Run it in the harness's environment (see tests/evaluation/harness/make_references.py):

    VENV/bin/python benchmarks/evaluation/harness_side.py prompts gsm8k test.jsonl train.jsonl \\
        > FILE
    VENV/bin/python benchmarks/evaluation/harness_side.py run MODEL gsm8k test.jsonl train.jsonl \\
        --limit 32 > FILE
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "evaluation" / "harness"))

import lm_eval
from make_references import prompts, task_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prompts", "run"])
    parser.add_argument("arguments", nargs="+", metavar="[MODEL] TASK TEST [TRAIN]")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    name, *paths = options.arguments[options.what == "run" :]
    files = dict(
        zip(("test", "train"), map(str, map(Path.absolute, map(Path, paths))), strict=False)
    )
    if options.what == "prompts":
        json.dump(prompts(name, files), sys.stdout)
        return
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": options.arguments[0], "dtype": "float32"},
        tasks=[task_of(name, files)],
        limit=options.limit,
        batch_size=options.batch,
        device="cpu",
    )
    samples = {
        f"{sample['filter']} {sample['doc_id']}": sample["resps"][0][0]
        for rows in results["samples"].values()
        for sample in rows
    }
    json.dump({"results": results["results"], "outputs": samples}, sys.stdout, default=str)


if __name__ == "__main__":
    main()
