"""The warm-up meets every allowed primitive."""

import json

import jax

from sdjax.sandbox.contract import Limits
from sdjax.sandbox.encode import Encoder
from sdjax.sandbox.primitives import ALLOWED, CONTROL_FLOW
from sdjax.sandbox.trace import trace_trusted
from sdjax.sandbox.warmth import RARE, SOURCES, rare


def _names(block):
    for name, _, _, params in block["equations"]:
        yield name
        for value in (*params.values(), *params.get("branches", ())):
            if isinstance(value, dict) and "equations" in value:
                yield from _names(value)


def test_every_allowed_primitive_is_traced_before_the_first_fork(contract):
    blocks = [Encoder(Limits()).block(jax.make_jaxpr(rare)(*RARE))]
    for source in SOURCES:
        message = json.loads(trace_trusted(source, contract))
        blocks += [program["block"] for program in message["programs"]]
    assert {name for block in blocks for name in _names(block)} == {*ALLOWED, *CONTROL_FLOW}
