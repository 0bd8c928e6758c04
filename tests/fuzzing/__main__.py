"""Long run of the fuzzer.

    python -m tests.fuzzing --inputs 100000                     every kind, 100,000 inputs each
    python -m tests.fuzzing --kind recipe --inputs 5000 --seed 1
    python -m tests.fuzzing --kind recipe --number 17           one input, with its traceback
    python -m tests.fuzzing --kind recipe --atheris CORPUS -runs=100000      (needs atheris)

Each kind runs in a process of its own. FOLDER (--out) has the state of every kind, with which the
same command resumes, and the input and the traceback of the first fault of each mechanism. The exit
status is 1 if there are faults.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from tests.fuzzing.run import fuzz
from tests.fuzzing.supervise import supervise
from tests.fuzzing.targets import KINDS


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--kind", action="append", choices=KINDS, help="all kinds by default")
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="run this input only, and show its fault")
    parser.add_argument("--out", type=Path, default=Path("/tmp/sdjax-fuzzing"))
    parser.add_argument("--atheris", type=Path, help="corpus; flags of libFuzzer may follow")
    options, flags = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = options.kind or list(KINDS)
    if options.atheris is not None:
        from tests.fuzzing.guided import fuzz_guided

        fuzz_guided(kinds[0], options.atheris, flags)
    elif flags:
        parser.error(f"unknown arguments: {' '.join(flags)}")
    if options.number is not None:
        numbers = range(options.number, options.number + 1)
        for _, outcome in fuzz(kinds[0], numbers, seed=options.seed, keep=options.out / "faults"):
            print(outcome.fault or f"accepted {outcome.accepted}, refused {outcome.refused}")
        return 0
    faults = [supervise(kind, options.seed, options.inputs, options.out) for kind in kinds]
    return int(any(faults))


if __name__ == "__main__":
    sys.exit(main())
