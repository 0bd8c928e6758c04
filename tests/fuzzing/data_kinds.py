"""Kinds: data of tasks and training, results of evaluations, and prompts."""

import functools
import gzip
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzzing import inputs, mutations
from tests.fuzzing.kinds import Kind
from tests.fuzzing.model_kinds import shared_model


def jsonl() -> Kind:
    """Data of tasks and of training, and results of evaluations."""
    files = {name: inputs.jsonl(rows) for name, rows in inputs.data_rows()}
    return Kind(
        folders=[{name: content} for name, content in files.items()],
        formats=dict.fromkeys(files, mutations.mutate_jsonl),
        loaders=[(read_data, 1)],
        words=inputs.words("evaluation/tasks", "training/data.py", "evaluation/results.py"),
        shared=shared_model(),
    )


def jsonl_gzip() -> Kind:
    """Compressed data of training."""
    content = gzip.compress(inputs.jsonl(dict(inputs.data_rows())["sft.jsonl"]), mtime=0)
    return Kind(
        folders=[{"sft.jsonl.gz": content}],
        formats={"sft.jsonl.gz": mutations.mutate_jsonl_gzip},
        loaders=[(read_data, 1)],
        words=inputs.words("training/data.py"),
        shared=shared_model(),
    )


def dataset_folder() -> Kind:
    """Settings of a local folder that the `datasets` library reads."""
    configs = "configs: [{config_name: default, data_files: [{split: train, path: train*}]}]\n"
    features = "dataset_info: {features: [{name: a, dtype: string}]}\n"
    rows = inputs.jsonl([{"a": "x"}])
    return Kind(
        folders=[{".huggingface.yaml": (configs + features).encode(), "train.jsonl": rows}],
        formats={".huggingface.yaml": mutations.mutate_yaml},
        loaders=[(load_folder, 1)],
        words=(
            *inputs.words("io/dataset_folder.py"),
            *(
                "../outside/secret.txt",
                "http://127.0.0.1:9/x",
                "zip://x::y",
                "image",
                "audio",
                "**",
            ),
        ),
    )


def load_folder(folder: Path) -> None:
    import datasets

    from sdjax.core.errors import UserError
    from sdjax.io.hub import HubError, load_dataset

    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        try:
            list(load_dataset(str(folder), split="train"))
        except HubError as error:  # as the commands report it
            raise UserError(str(error)) from None


def read_data(folder: Path) -> None:
    from sdjax.evaluation.comparison import compare
    from sdjax.evaluation.prompts import build_prompts
    from sdjax.evaluation.task import grade_output, read_problems
    from sdjax.evaluation.tasks.registry import find_task
    from sdjax.training.data import fingerprint, read_rows, tokenize_examples, tokenize_pairs

    path = next(folder.iterdir(), folder / "sft.jsonl")
    if path.name.startswith(("sft", "dpo")):
        rows = read_rows(str(path), "train")
        fingerprint(rows)
        tokenize = tokenize_examples if path.name.startswith("sft") else tokenize_pairs
        tokenize(rows, _tokenizer(), 64)
    elif path.stem == "results":
        compare(path, path)
    else:
        name = str(path) if path.stem == "questions" else path.stem
        data = None if path.stem == "questions" else path
        task = find_task(name, data=data, allow_missing=())
        for split in ("development", "test"):
            problems = read_problems(task, split)
            build_prompts(task, problems, _tokenizer())
            if path.stem != "math":  # whose grader is a process of its own
                for problem in problems:
                    grade_output(task, problem, problem.solution or problem.answer)


def results() -> Kind:
    """Results folder of an evaluation."""
    settings = {"model": "m", "weights": "w", "task": "t", "max_new_tokens": 8, "dtype": "float32"}
    stored = settings | {"versions": {"jax": "0.10.2"}, "accepted": []}
    rows = dict(inputs.data_rows())["results.jsonl"]
    return Kind(
        folders=[
            {
                "settings.json": json.dumps(stored).encode(),
                "results.jsonl": inputs.jsonl(rows),
            }
        ],
        formats={"settings.json": mutations.mutate_json, "results.jsonl": mutations.mutate_jsonl},
        loaders=[(functools.partial(resume_results, settings), 1)],
        words=inputs.words("evaluation/results.py"),
        writes=True,
    )


def resume_results(settings: Mapping[str, Any], folder: Path) -> None:
    from sdjax.evaluation.prompts import PromptedProblem
    from sdjax.evaluation.results import ProblemResult, ResultsFolder
    from sdjax.evaluation.task import Outcome, Problem

    problems = [
        PromptedProblem(
            problem=Problem(id=f"test-{n}", kind="k", question="a", answer="1"), text="", tokens=()
        )
        for n in range(3)
    ]
    with ResultsFolder(folder, settings, versions={"jax": "0.12"}, accept_versions=True) as opened:
        for item in opened.missing(problems):
            outcome = Outcome(problem_id=item.problem.id, output="", strict=False, flexible=False)
            opened.add(ProblemResult.create(item, outcome))
        opened.finish([item.problem.id for item in problems])


def prompt() -> Kind:
    """Prompt of a generator."""
    files = (inputs.PACKAGE / "programs/prompts").iterdir()
    return Kind(
        folders=[{f"prompt{path.suffix}": path.read_bytes()} for path in sorted(files)],
        formats=dict.fromkeys(("prompt.txt", "prompt.jinja"), mutations.mutate_text),
        loaders=[(render_prompt, 1)],
        words=(
            *("$experts", "${names}", "$$", "$x", "${", "$count$names", "$é"),
            *("{{ programs }}", "{% for one in refused %}", "{% endfor %}", "{{", "%}", "| fenced"),
        ),
    )


def render_prompt(folder: Path) -> None:
    from sdjax.programs.memory_prompts import EarlierProgram, PromptMemory
    from sdjax.programs.prompts import find_prompt

    for path in folder.glob("prompt.*"):
        found = find_prompt(str(path))
        memory = PromptMemory(programs=(EarlierProgram(source="{{ `", score=1.0),))
        found.render(slots=("expert_1",), descriptions={"expert_1": "x"}, memory=memory)


@functools.cache
def _tokenizer() -> Any:
    from sdjax.io.tokenizer import load_tokenizer

    return load_tokenizer(Path("base").resolve())
