"""Compare the demo's best program with simpler controls: tuned weights, and a structure in depth.

Every step is a command of `sdjax`, which is printed. What exists in --out is not computed again, so
the same command resumes. The demo's run is one without a race, tuning and controls.
"""

import argparse
import re
from pathlib import Path

import sdjax
from benchmarks.environment import describe_environment
from sdjax.cli.main import main as sdjax_command
from sdjax.evaluation.statistics import Interval, accuracy_interval, paired_by_key
from sdjax.io.jsonl import read_jsonl

EXPERTS = {"expert_1": "zoo:reader", "expert_2": "zoo:calculator", "expert_3": "zoo:judge"}
MODELS = ["--base", "zoo:seed"]
for name, model in EXPERTS.items():
    MODELS += ["--expert", f"{name}={model}"]
SCOPE = ["--scope", "mlp"]
PROGRAM = Path(__file__).with_name("depth_structure.py")
# The demo's run without a race, tuning and controls, whose search sees the 640 development problems
# that the other rows are scored on.
DEMO = ("race=null", "tuning=null", "controls=null", "task.development=640", "task.confirmation=0")
REFERENCE = "one weight per expert, gradient"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tuned-controls"))
    parser.add_argument("--run", type=Path, help="a finished run of the demo  [default: runs one]")
    parser.add_argument("--budget", type=int, default=192, help="evaluations by CMA-ES")
    parser.add_argument("--seeds", type=int, default=3, help="searches by CMA-ES")
    options = parser.parse_args()
    print(describe_environment(), flush=True)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    run = options.run or out / "demo"
    if options.run is None:
        resumed = (run / "run.sqlite").exists()
        settings = [word for setting in DEMO for word in ("--set", setting)]
        command("run", *(["--resume", run] if resumed else ["demo", *settings, "--out", run]))

    models: dict[str, tuple[str, Path]] = {}  # name -> number of constants, merged model

    def merged(name: str, constants: str, folder: str, *arguments: object) -> None:
        models[name] = constants, out / folder
        if not (out / folder).exists():
            command("merge", *arguments, out / folder)

    method = ["--algorithm", "task_arithmetic", "--param", "weight=0.7"]
    merged("task_arithmetic(0.7)", "1", "task-arithmetic", *method, *MODELS, *SCOPE)
    merged("slerp()", "0", "slerp", "--algorithm", "slerp", *MODELS, *SCOPE)
    merged("the demo's best program", constants_of(run), "demo-best", "--run", run, "--rank", "1")

    def tuned(name: str, suffix: str, *arguments: object) -> None:
        folder = out / f"weights-{suffix}"
        models[name] = "3", folder
        if not folder.exists():
            files = ["--out", out / f"search-{suffix}", "--merged", folder]
            command("tune", "weights", *MODELS, *SCOPE, *arguments, *files)

    tuned(REFERENCE, "gradient", "--budget", 4, "--optimizer", "gradient")
    for seed in range(options.seeds):
        evolution = ["--budget", options.budget, "--optimizer", "cmaes", "--seed", seed]
        tuned(f"one weight per expert, CMA-ES, seed {seed}", str(seed), *evolution)
    name = "0.7 a + 0.9 b + where(depth < 1/2, 0.6, 0.1) c"
    merged(f"`{name}`, by hand", "4", "depth", "--algorithm", PROGRAM, *MODELS, *SCOPE)

    rows = {name: (number, scores(folder)) for name, (number, folder) in models.items()}
    reference = rows[REFERENCE][1]["test"]
    print("\n| merge | constants | development | test | test minus the tuned weights |")
    print("|---|---|---|---|---|")
    for name, (number, correct) in rows.items():
        development, test = (
            percent(accuracy_interval([*correct[split].values()]).mean)
            for split in ("development", "test")
        )
        gain = "0" if name == REFERENCE else points(paired_by_key(correct["test"], reference))
        print(f"| {name} | {number} | {development} | {test} | {gain} |")


def command(*arguments: object) -> None:
    """Run a command of `sdjax` in this process."""
    words = [str(argument) for argument in arguments]
    print("sdjax", *words, flush=True)
    sdjax_command.main(words, prog_name="sdjax")


def constants_of(run: Path) -> str:
    """Return the number of numeric literals with a decimal point in a run's best program."""
    from sdjax.search.ranking import final_ranking
    from sdjax.search.store import Store

    with Store.open(run) as store:
        best = final_ranking(store, store.config().task.metric)[0]
        return str(len(re.findall(r"\d\.\d+", store.program(best.identity or "").source)))


def scores(model: Path) -> dict[str, dict[str, bool]]:
    """Return for each split whether each problem is solved, by its id."""
    correct = {}
    for split in ("development", "test"):
        folder = model.with_name(f"{model.name}-{split}")
        sdjax.evaluate(str(model), "arithmetic", split=split, out=folder)
        rows = read_jsonl(folder / "results.jsonl", ("id", "strict"))
        correct[split] = {row["id"]: row["strict"] for _, row in rows}
    return correct


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def points(gain: Interval) -> str:
    return f"{gain.in_percent(signed=True)}"


if __name__ == "__main__":
    main()
