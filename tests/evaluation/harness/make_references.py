"""Reference results of lm-evaluation-harness for the tests in this folder.

Run it in a separate environment:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install 'lm_eval[hf,math]==0.4.13'
    VENV/bin/python tests/evaluation/harness/make_references.py

It writes prompts.json, the prompts of the problems in this folder, and grades.json, the extracted
answer of each filter and the value of each metric for golden and random outputs. The benchmarks in
benchmarks/evaluation compare `prompts` and `grades` on real data.
"""

import json
import os
import random
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import yaml
from lm_eval import tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

HERE = Path(__file__).parent
HARNESS = Path(tasks.__file__).parent
CONFIGS = {"gsm8k": "gsm8k/gsm8k.yaml", "math": "minerva_math/minerva_math_algebra.yaml"}
FIELDS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}
DRAWN = 200

NUMBERS = [
    "0",
    "7",
    "-3",
    "12.5",
    "1,000",
    "$40",
    "1,234.56",
    "50%",
    "3/4",
    "-0.5",
    "10,000,000",
    ".5",
    "2.",
    "007",
    "5-2",
]
WORDS = (
    *("#### ", "####", "### ", "The answer is ", " dollars", " = ", ".", ",", "$", "\n", " and "),
    *("Question:", "</s>", "-", "%", "So ", "x", " apples", "\n\n", "**", ": "),
)
FORMULAS = (
    *(r"\frac{1}{2}", r"\frac12", "0.5", "1/2", "2", "-2", r"2\sqrt{3}", r"\sqrt{12}", "[2,5)"),
    *("(1,2)", "10,000", "10000", r"50\%", r"90^\circ", r"\$5", r"5\text{ cm}", "x=5", "5", "1,2"),
    *("2,1", "3+4i", r"\pi", r"x^2-1", "(x-1)(x+1)", r"\text{east}", "y=2x", r"\dfrac{2}{4}"),
)
ENDS = (
    "So we get $\\boxed{{{0}}}$.\nFinal Answer: The final answer is ${0}$. I hope it is correct.",
    "Final Answer: The final answer is {0}. I hope it is correct.",
    "Final Answer: The final answer is ${0}$.\n\nProblem:\nAnother?",
    "Therefore the answer is $\\boxed{{{0}}}$.",
    "The answer is ${0}$",
    "\\boxed{{{0}}}, since $1 + 1 = 2$",
)


def task_of(name: str, files: dict[str, str]):
    """Return the harness's task with its data set replaced by local files."""
    data = {
        "include": str(HARNESS / CONFIGS[name]),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": "train" if "train" in files else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "local.yaml").write_text(yaml.safe_dump(data))
        manager = TaskManager(include_path=folder)
        return manager.load_task_or_group(f"local_{name}")[f"local_{name}"]


def prompts(name: str, files: dict[str, str]) -> list[str]:
    """Return the prompt of each test problem."""
    task = task_of(name, files)
    task.set_fewshot_seed(seed=1234)  # as `lm_eval run` does by default
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args[0] for instance in task.instances]


def grades(name: str, pairs: list[tuple[str, str]]) -> list[dict]:
    """Return extracted answers and metrics by filter; pairs are (answer, output)."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for answer, _ in pairs:
            shown = answer if name == "gsm8k" else rf"\boxed{{{answer}}}"
            print(json.dumps(dict(zip(FIELDS[name], ("?", shown), strict=True))), file=file)
        file.flush()
        task = task_of(name, {"test": file.name, "train": file.name})
        documents = list(task.test_docs())
    instances = [
        Instance("generate_until", document, ("", {}), index, metadata=("local", index, 1))
        for index, document in enumerate(documents)
    ]
    for instance, (_, output) in zip(instances, pairs, strict=True):
        for stop in task.config.generation_kwargs["until"]:
            output = output.split(stop)[0]  # as the harness's models do
        instance.resps = [output]
    task._instances = instances
    task.apply_filters()
    return [
        {
            filtered: {"text": text} | task.process_results(document, [text])
            for filtered, text in instance.filtered_resps.items()
        }
        for document, instance in zip(documents, instances, strict=True)
    ]


def random_outputs(name: str) -> list[tuple[str, str]]:
    """Return outputs composed of pieces that are difficult to grade."""
    draw = random.Random(name)
    if name == "math":
        return [
            (draw.choice(FORMULAS), draw.choice(ENDS).format(draw.choice(FORMULAS)))
            for _ in range(DRAWN)
        ]
    pairs = []
    for _ in range(DRAWN):
        pieces = [draw.choice(draw.choice((NUMBERS, WORDS))) for _ in range(draw.randint(1, 9))]
        pairs.append((draw.choice(NUMBERS).strip("$%"), "".join(pieces)))
    return pairs


def golden(name: str) -> list[tuple[str, str]]:
    lines = (HERE.parent / "golden.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"] == name]
    return [(row["answer"], row["output"]) for row in rows if len(row["output"]) < 1000]


def main() -> None:
    files = {split: str(HERE / f"gsm8k_{split}.jsonl") for split in ("test", "train")}
    prompts_by_task = {
        "gsm8k": prompts("gsm8k", files),
        "math": prompts("math", {"test": str(HERE / "math_test.jsonl")}),
    }
    (HERE / "prompts.json").write_text(json.dumps(prompts_by_task, indent=1) + "\n")
    answered = {}
    for name in CONFIGS:
        pairs = [*golden(name), *random_outputs(name)]
        answered[name] = [
            {"answer": answer, "output": output, "filters": filters}
            for (answer, output), filters in zip(pairs, grades(name, pairs), strict=True)
        ]
    (HERE / "grades.json").write_text(json.dumps(answered, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
