"""The command lines of short jobs on the zoo, and what they have written."""

import json
from pathlib import Path

import yaml

from sdjax.io.model_paths import zoo_models
from sdjax.search.attempts import DATABASE_FILE
from sdjax.search.score_types import StoredPair
from sdjax.search.store import Store


def check(folder):
    """Return a command that judges a program; it writes nothing."""
    source = folder / "good.py"
    source.write_text(
        "def merge_models(task_vectors):\n    return task_vectors['expert_1'] * 0.7\n"
    )
    return ("check", source, "--json")


def merge(folder, out=None):
    """Return a command that merges two experts by a recipe."""
    models = zoo_models()
    experts = [
        {"model": str(models[name]), "parameters": {"weight": 0.7, "density": 0.5}}
        for name in ("reader", "calculator")
    ]
    recipe = {"merge_method": "ties", "base_model": str(models["seed"]), "models": experts}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ("merge", folder / "recipe.yaml", out or folder / "out")


def evaluation(folder, out=None):
    """Return a command that evaluates the seed on 40 problems."""
    return ("eval", "zoo:seed", "--limit", "40", "--out", out or folder / "out")


def generate(folder, out=None):
    """Return a command that samples and judges eight programs."""
    size = ("-n", "8", "--slots", "8", "--max-new-tokens", "96")
    out = out or folder / "out"
    return ("generate", "zoo:seed", "--prompt", "short", *size, "--check", "--out", out)


def search(folder, out=None):
    """Return a command that starts or resumes a minimal run."""
    out = out or folder / "out"
    if (out / DATABASE_FILE).exists():
        return ("run", "--resume", out)
    config = yaml.safe_load(Path("configs/demo.yaml").read_text())
    config |= {"iterations": 1, "transfer": {}, "test": {"top_k": 1}}
    config["task"] |= {"development": 24, "test": 24}
    config["generation"] |= {"samples": 8}
    config["generation"]["decoding"] |= {"slots": 8, "prefill_batch": 8}
    config["training"] |= {"max_steps": 2, "rank": 2, "batch_size": 2}
    config["baselines"] = {"paper": {"task_arithmetic": {"weight": [0.2, 0.6]}}}
    config["controls"] = {"tuned": ["weights"], "random": False, "max_evaluations": 2}
    (folder / "search.yaml").write_text(yaml.safe_dump(config))
    return ("run", folder / "search.yaml", "--out", out)


def train_sft(folder, out=None):
    """Return a command that fine-tunes the seed on four examples."""
    return _train("sft", folder, out, max_length=64, batch_size=2)


def train_dpo(folder, out=None):
    """Return a command that trains the seed on four preference pairs."""
    return _train("dpo", folder, out, batch_size=2)


def train_warmstart(folder, out=None):
    """Return a command that trains the seed on eight random programs."""
    return _train(
        "warmstart",
        folder,
        out,
        experts=["reads", "calculates"],
        prompt="short",
        programs=8,
        batch_size=4,
    )


def _train(kind, folder, out, **options):
    config = {"model": "zoo:seed", "out": str(out or folder / "out"), "max_steps": 6}
    config |= {"checkpoint_every": 2, "rank": 2, "learning_rate": 1e-3, **options}
    if kind != "warmstart":
        row = {"prompt": "1+1=", "completion": "2", "chosen": "2", "rejected": "3"}
        (folder / "data.jsonl").write_text(4 * f"{json.dumps(row)}\n")
        config["data"] = str(folder / "data.jsonl")
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config))
    return ("train", kind, folder / f"{kind}.yaml")


def result(out):
    """Return everything in a complete output that is the same each time, or nothing."""
    if out.is_file():
        return [out.read_text()]
    if (out / DATABASE_FILE).exists():
        with Store.open(out) as store:
            if store.run().finished_at is None:
                return []
            scores = [
                (row.entry, row.split, row.strict, row.flexible)
                for row in store.summaries(setting=None)
            ]
            samples = [(sample.text, sample.status) for sample in store.judged()]
            return [samples, sorted(scores), store.select(StoredPair, iteration=1)]
    if (out / "results.jsonl").exists() and not (out / "scores.json").exists():
        return []
    names = ("*.safetensors", "*.json", "*.json.gz", "*.npy", "*.jsonl")
    return [(path.name, path.read_bytes()) for name in names for path in sorted(out.glob(name))]
