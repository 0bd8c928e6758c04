"""Programs as the supported JAX versions store them: `stored/jax-VERSION.json`.

    python tests/sandbox/ir/stored_programs.py     # writes the file of the running JAX version

Each file holds, by name, a program's IR, its identity and structure, and its result (float32 in
base64) for one tensor of the signature on fixed inputs.
"""

import base64
import json
import sys
from pathlib import Path

import jax
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for `catalogue`

from catalogue import VALID, merge  # noqa: E402

from sdjax.sandbox.signature import MergeSignature  # noqa: E402
from sdjax.sandbox.verify.verified_program import verify_ir  # noqa: E402
from sdjax.sandbox.worker.trace import trace_trusted  # noqa: E402

FILES = sorted((HERE / "stored").glob("jax-*.json"))
SHAPE = (16, 8)
SLOTS = ("expert_1", "expert_2", "expert_3")
SIGNATURE = MergeSignature.of(
    SLOTS,
    {
        f"layers/{layer}/mlp/{name}": (f"mlp.{name}", shape)
        for layer in range(2)
        for name, shape in {"gate_proj": SHAPE, "up_proj": SHAPE, "down_proj": (8, 16)}.items()
    },
)
PROGRAMS = {
    **{name: source for name, source in VALID.items() if name not in ("tree",)},
    # Traced to primitives that only JAX 0.12 has.
    "rows": merge("return jnp.stack([0.5 * row for row in task_vectors['expert_1']])"),
    "unstack": merge("return jnp.stack(jnp.unstack(task_vectors['expert_1'], axis=1)[::-1], 1)"),
    "log2": merge("return jnp.log2(1 + jnp.abs(task_vectors['expert_2']))"),
    "polyval": merge("return jnp.polyval(jnp.array([0.5, -1.0, 2.0]), task_vectors['expert_1'])"),
    "derivative of arctanh": merge(
        "return jax.grad(lambda x: jnp.sum(jnp.arctanh(0.1 * x)))(task_vectors['expert_1'])"
    ),
}


def result_of(ir: str) -> np.ndarray:
    """Return the program's result for one tensor on fixed inputs."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((4, *SHAPE)).astype(np.float32)
    program = verify_ir(ir, SIGNATURE)
    run = jax.jit(
        lambda vectors, base, key, depth: program(
            vectors, base=base, key=key, depth=depth, kind="mlp.gate_proj"
        )
    )
    return np.asarray(run(list(arrays[:3]), arrays[3], jax.random.key(0), np.float32(0.5)))


def store(ir: str) -> dict[str, str]:
    """Return one entry of a file."""
    program = verify_ir(ir, SIGNATURE)
    return {
        "ir": ir,
        "identity": program.identity,
        "structure": program.structure,
        "result": base64.b64encode(result_of(ir).tobytes()).decode(),
    }


if __name__ == "__main__":
    entries = {name: store(trace_trusted(source, SIGNATURE)) for name, source in PROGRAMS.items()}
    path = HERE / "stored" / f"jax-{jax.__version__}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"{path}: {len(entries)} programs, {path.stat().st_size} bytes")
