"""Measure what a short program can gain over one weight per expert on the zoo.

The script tunes families of merges and programs by gradient, and scores them on the calibration
split. No test problem is read. The programs gate none, one or all of the experts in the tensors
where they unlearned something; they are scored as written and tuned. A gate per neuron, tuned by
gradient, shows the ceiling. The program with all gates, tuned on the demo's experts, then merges
the transfer experts as it is, next to merges that are tuned there.

    python -m benchmarks.zoo.headroom --models sdjax/zoo/models

What exists in --out is not computed again, so the same command resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sdjax
from benchmarks.environment import describe_environment
from sdjax.cli.main import main as sdjax_command
from sdjax.evaluation.statistics import accuracy_interval, paired_difference
from sdjax.evaluation.tasks.arithmetic import KINDS
from sdjax.io.atomic_write import write_file
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import ZOO
from sdjax.io.tokenizer import load_tokenizer
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.training.sft import sft_loss
from sdjax.zoo.data import ExerciseStream, packed_batches
from sdjax.zoo.recipes import EXPERTS, TRANSFER_EXPERTS, ExpertRecipe
from sdjax.zoo.train import Evaluator

FAMILIES = {"weights": 3, "slope": 6, "layers": 12, "kinds": 36}
# Expert -> its term without and with a gate, each with numbers that nobody tuned.
TERMS = {
    "a": ("1.0 * a", "jnp.where(depth < 1, 0.1, 1.0) * a"),
    "b": ("1.0 * b", '(1.0 if kind == "mlp.down_proj" else 0.1) * b'),
    "c": ("1.0 * c", "jnp.where(2 * depth < 1, 1.0, 0.1) * c"),
}
PROGRAM = """import jax.numpy as jnp


def merge_models(task_vectors, depth, kind):
    a, b, c = task_vectors.values()
    return {}
"""
GATED = ("", "a", "b", "c", "abc")
GRADIENT = {"optimizer": "gradient", "budget": 4, "steps": 60}
NEURON_STEPS, NEURON_LEARNING_RATE, NEURON_ROWS = 120, 0.05, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ZOO, help="folder of the zoo's models")
    parser.add_argument("--out", type=Path, default=Path("runs/headroom"))
    options = parser.parse_args()
    print(describe_environment(), flush=True)
    main_experts = Measurement(options.models, options.out / "main", EXPERTS)
    main_experts.measure_families()
    tuned = main_experts.measure_programs()
    main_experts.measure_neurons()
    main_experts.print_table("The demo's experts")
    transfer = Measurement(options.models, options.out / "transfer", TRANSFER_EXPERTS)
    transfer.measure_families()
    transfer.merge("all gates, tuned on the demo's experts, untouched", 6, tuned)
    transfer.print_table("The transfer experts")


class Measurement:
    """Scores of merges of three experts, kept in a folder."""

    def __init__(self, models: Path, folder: Path, recipes: Sequence[ExpertRecipe]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._seed = models / "seed"
        self._experts = {
            f"expert_{number}": str(models / recipe.name)
            for number, recipe in enumerate(recipes, 1)
        }
        self._config: ModelConfig = load_config(self._seed)
        self._tokenizer = load_tokenizer(self._seed)
        self._evaluator = Evaluator(self._tokenizer, self._config, split="calibration")
        self._rows: dict[str, tuple[int, np.ndarray]] = {}
        for name in ("seed", *(recipe.name for recipe in recipes)):
            self._score(name, 0, lambda name=name: load_model(models / name)[1])

    def measure_families(self) -> None:
        """Tune and score the families of merges over task arithmetic."""
        for family, numbers in FAMILIES.items():
            self._tune(f"family {family}, tuned", numbers, family, family)

    def measure_programs(self) -> Path:
        """Score each program as written and tuned; return the tuned one with all gates."""
        for gated in GATED:
            terms = (term[name in gated] for name, term in TERMS.items())
            program = self._folder / f"gates-{gated or 'none'}.py"
            write_file(program, PROGRAM.format(" + ".join(terms)))
            name = "all gates" if len(gated) > 1 else f"gate on {gated}" if gated else "no gate"
            numbers = len(TERMS) + len(gated)
            self.merge(f"{name}, as written", numbers, program)
            out = self._tune(f"{name}, tuned", numbers, str(program), program.stem)
        return out / "tuned.py"

    def measure_neurons(self) -> None:
        """Tune one gate per expert, tensor and neuron by gradient, and score the merge."""
        shape = (len(self._experts), self._config.num_layers, 3, self._config.intermediate_size)
        self._score("a gate per neuron, by gradient", int(np.prod(shape)), self._gated_by_neuron)

    def merge(self, name: str, numbers: int, program: Path) -> None:
        """Score a program as it is."""
        folder = self._folder / f"merged-{name.replace(' ', '-')}"
        models = [f"--expert={expert}={path}" for expert, path in self._experts.items()]
        if not folder.exists():
            words = ["merge", "--algorithm", program, "--base", self._seed, "--scope", "mlp"]
            arguments = [str(word) for word in (*words, *models, folder)]
            sdjax_command.main(arguments, prog_name="sdjax")
        self._score(name, numbers, lambda: load_model(folder)[1])

    def print_table(self, title: str) -> None:
        """Print all rows with their differences from the tuned weights."""
        _, reference = self._rows["family weights, tuned"]
        kinds = np.array([problem.kind for problem in self._evaluator.problems])
        print(f"\n{title}: strict accuracy in % on {len(reference)} calibration problems\n")
        print(f"| merge | numbers | all | minus the tuned weights | {' | '.join(KINDS)} |")
        print("|---|---|---|---|" + "---|" * len(KINDS), flush=True)
        for name, (numbers, correct) in self._rows.items():
            gain = paired_difference(correct, reference).in_percent(signed=True)
            cells = " | ".join(f"{100 * correct[kinds == kind].mean():.0f}" for kind in KINDS)
            accuracy = accuracy_interval(list(correct)).mean
            print(f"| {name} | {numbers} | {100 * accuracy:.1f} | {gain} | {cells} |", flush=True)

    def _tune(self, name: str, numbers: int, what: str, stem: str) -> Path:
        out, merged = self._folder / f"tuning-{stem}", self._folder / f"tuned-{stem}"
        if not merged.exists():
            models = {"base": str(self._seed), "experts": self._experts, "scope": "mlp"}
            sdjax.tune(what, **models, **GRADIENT, out=out, merged=merged)
        self._score(name, numbers, lambda: load_model(merged)[1])
        return out

    def _score(self, name: str, numbers: int, params: Callable[[], Params]) -> None:
        """Score a model, unless a file has its outcomes, and report its accuracy."""
        file = self._folder / f"{name.replace(' ', '-')}.json"
        if not file.exists():
            outcomes = self._evaluator.outcomes(params())
            write_file(file, json.dumps([outcome.strict for outcome in outcomes]))
        correct = np.array(json.loads(file.read_text()), float)
        self._rows[name] = numbers, correct
        print(f"{name}: {100 * correct.mean():.1f} %", flush=True)

    def _gated_by_neuron(self) -> Params:
        base = flatten(load_model(self._seed, dtype=jnp.float32)[1])
        paths = select_paths(base, "mlp")
        vectors: list[dict[str, jax.Array]] = []
        for folder in self._experts.values():
            expert = flatten(load_model(folder, dtype=jnp.float32)[1])
            vectors.append({path: expert[path] - base[path] for path in paths})
        count = len(vectors)
        neurons = {path: base[path].shape["down_proj" in path] for path in paths}
        gates = {path: jnp.full((count, size), 0.5) for path, size in neurons.items()}
        merged = partial(_gated, base, vectors)
        loss = sft_loss(self._config)
        optimizer = optax.adam(NEURON_LEARNING_RATE)
        stream = ExerciseStream(self._tokenizer, 0)
        batches = packed_batches(
            partial(stream.sample, dict.fromkeys(KINDS, 1.0)),
            rows=NEURON_ROWS,
            length=128,
            batches=NEURON_STEPS,
        )

        @jax.jit
        def step(gates, state, batch):
            gradient = jax.grad(lambda gates: loss({}, merged(gates), batch)[0])(gates)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(gates, updates), state

        state = optimizer.init(gates)
        for batch in batches:
            gates, state = step(gates, state, batch)
        return unflatten(merged(gates))


def _gated(
    base: Mapping[str, jax.Array],
    vectors: Sequence[Mapping[str, jax.Array]],
    gates: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Return the merged tensors; gates [experts, neurons] scale rows, or columns of down_proj."""
    tensors = dict(base)
    for path, gate in gates.items():
        scale = gate[:, None, :] if "down_proj" in path else gate[:, :, None]
        stacked = jnp.stack([vector[path] for vector in vectors])
        tensors[path] = base[path] + jnp.sum(scale * stacked, axis=0)
    return tensors


if __name__ == "__main__":
    main()
