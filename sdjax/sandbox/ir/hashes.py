"""The two hashes of a message that has been decoded: what it is, and what it compiles to."""

import hashlib
import json
from typing import Any

# A float literal that feeds only these may become an argument of a compiled program.
LIFTED = ("add", "sub", "mul", "select_n")


def canonical(message: Any) -> str:
    """The one way to write a message."""
    return json.dumps(message, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identity_of(ir: str) -> str:
    """The hash of the normal form: equal for programs that differ in text alone."""
    return hashlib.sha256(ir.encode()).hexdigest()


def structure_of(ir: str) -> str:
    """The same with the liftable float literals blanked: the key of a compilation cache."""
    message = json.loads(ir)
    message["hyperparameters"] = sorted(message["hyperparameters"])
    for program in message["programs"]:
        program["block"] = _lift(program["block"])
    return hashlib.sha256(canonical(message).encode()).hexdigest()


def _lift(block: dict[str, Any]) -> dict[str, Any]:
    readers: dict[int, set[str]] = {}
    for name, operands, _, _ in block["equations"]:
        for atom in operands:
            if isinstance(atom, int):
                readers.setdefault(atom, set()).add(name)
    for atom in block["outputs"]:
        if isinstance(atom, int):
            readers.setdefault(atom, set()).add("output")
    equations, number = [], block["inputs"]
    for name, operands, outputs, params in block["equations"]:
        spread = name == "broadcast_in_dim" and readers.get(number, {""}) <= set(LIFTED)
        if name in LIFTED or spread:
            operands = [
                [a[0], None] if isinstance(a, list) and a[0] == "float32" else a for a in operands
            ]
        params = {k: _lift(v) if _is_block(v) else v for k, v in params.items()}
        if name == "cond":
            params["branches"] = [_lift(b) for b in params["branches"]]
        equations.append([name, operands, outputs, params])
        number += outputs
    return block | {"equations": equations}


def _is_block(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"inputs", "equations", "outputs"}
