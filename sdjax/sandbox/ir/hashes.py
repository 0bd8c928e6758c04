"""Hashes of IR: its identity, and its structure, which is the key of a compile cache."""

import hashlib
import json
from typing import Any

# Float literals that feed only these primitives can become arguments of an executable.
LIFTABLE = ("add", "sub", "mul", "select_n")


def canonical(message: Any) -> str:
    """Return the canonical JSON text of a message."""
    return json.dumps(message, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identity_of(ir: str) -> str:
    """Hash the IR; candidates that differ only in source text have equal hashes."""
    return hashlib.sha256(ir.encode()).hexdigest()


def structure_of(ir: str) -> str:
    """Hash the IR without the float literals that can be lifted."""
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
        is_broadcast = name == "broadcast_in_dim" and readers.get(number, {""}) <= set(LIFTABLE)
        if name in LIFTABLE or is_broadcast:
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
