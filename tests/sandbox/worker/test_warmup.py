"""Coverage of the allowed primitives by the warm-up."""

import dataclasses
import json

import jax
import pytest
from catalogue import TIES

from sdjax.sandbox.config import Limits
from sdjax.sandbox.ir.encode import Encoder
from sdjax.sandbox.ir.primitives import ALLOWED, CONTROL_FLOW
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.sandbox.worker.warmup import RARE_ARGUMENTS, SOURCES, rare_functions, warm_up


def _names(block):
    for name, _, _, params in block["equations"]:
        yield name
        for value in (*params.values(), *params.get("branches", ())):
            if isinstance(value, dict) and "equations" in value:
                yield from _names(value)


def test_every_allowed_primitive_is_traced_before_the_first_fork(signature):
    blocks = [
        Encoder(Limits()).block(jax.make_jaxpr(function)(*RARE_ARGUMENTS))
        for function in rare_functions().values()
    ]
    for source in SOURCES:
        message = json.loads(trace_trusted(source, signature))
        blocks += [program["block"] for program in message["programs"]]
    present = {name for name, entry in ALLOWED.items() if entry.native}
    assert {name for block in blocks for name in _names(block)} == {*present, *CONTROL_FLOW}


def test_warmup_survives_a_primitive_missing_from_jax(signature, monkeypatch):
    monkeypatch.delattr(jax.lax, "cummax")
    monkeypatch.delattr(jax.lax, "while_loop")
    monkeypatch.delitem(ALLOWED, "sort")
    monkeypatch.setitem(ALLOWED, "eq_to", dataclasses.replace(ALLOWED["eq_to"], bind=None))
    warm_up(signature)


def test_equation_limit_grows_with_the_kinds_of_tensors():
    """Check the limit for several kinds, since each is traced separately."""
    tensors = {f"layers/0/{n}": (f"kind {n}", (6, 4 + n)) for n in range(7)}
    signature = MergeSignature.of(("a", "b", "c"), tensors)
    warm_up(signature)
    assert trace_trusted(TIES, signature)
    with pytest.raises(Refusal, match="more than 100 operations"):
        trace_trusted(TIES, MergeSignature.of(("a", "b"), tensors, Limits(equations=100)))
