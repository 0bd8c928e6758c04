"""lm-evaluation-harness on local files: prompts, or a whole evaluation by its `hf` model.

In the harness's environment (tests/evaluation/harness/make_references.py says how it is made):

    VENV/bin/python benchmarks/evaluation/theirs.py prompts gsm8k test.jsonl train.jsonl > FILE
    VENV/bin/python benchmarks/evaluation/theirs.py run MODEL gsm8k test.jsonl train.jsonl \\
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
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": options.arguments[0], "dtype": "float32"},
        tasks=[task_of(name, files)],
        limit=options.limit,
        batch_size=options.batch,
        device="cpu",
    )
    samples = {
        f"{sample['filter']} {sample['doc_id']}": sample["resps"][0][0]
        for rows in found["samples"].values()
        for sample in rows
    }
    json.dump({"results": found["results"], "outputs": samples}, sys.stdout, default=str)


if __name__ == "__main__":
    main()
