"""Identities of candidates that sdjax generated itself, traced in this process.

The only module outside the workers that imports the tracer. The import contracts allow only the
commands that write training programs to import it; a search cannot reach it.
"""

from collections.abc import Iterator, Sequence

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted


def candidate_identities(
    candidates: Sequence[str], signature: MergeSignature
) -> Iterator[int | None]:
    """Yield the first 64 bits of each candidate's identity, or None if it is refused.

    Only for candidates that sdjax generated itself, because they are traced in this process,
    outside the sandbox.
    """
    for text in candidates:
        try:
            yield int(verify_ir(trace_trusted(text, signature), signature).identity[:16], 16)
        except Refusal:
            yield None  # some candidates of the grammar fail on purpose
