"""The job of the sandbox's workers: a source text in, the traced program or a refusal out."""

import importlib
import json
from collections.abc import Callable

from sdjax.sandbox.signature import MergeSignature


def prepare(contract_text: str) -> Callable[[bytes], bytes]:
    """In the server: import and trace whatever programs commonly use, so that a worker finds it
    done. The function that a worker calls."""
    import jax

    from sdjax.sandbox.worker import rules, warmup

    signature = MergeSignature.from_json(contract_text)
    # No backend can be started: tracing needs none, and its threads would not survive a fork.
    jax.config.update("jax_platforms", "none")
    jax.config.update("jax_traceback_filtering", "off")
    for module in sorted(rules.IMPORTS):
        importlib.import_module(module)
    warmup.warm_up(signature)
    return lambda source: json.dumps(_trace(source, signature)).encode()


def _trace(source: bytes, signature: MergeSignature) -> dict[str, str]:
    from sdjax.sandbox.refusal import Refusal
    from sdjax.sandbox.worker.trace import trace_source

    try:
        return {"ir": trace_source(source.decode("utf-8", "surrogatepass"), signature)}
    except Refusal as refusal:
        return {"verdict": refusal.verdict, "rule": refusal.rule, "message": refusal.message}
    except MemoryError:
        message = "the program takes too much memory"
        return {"verdict": "too costly", "rule": "memory", "message": message}
    except Exception as error:  # of Python's own, before the program runs
        message = f"the program cannot be read ({type(error).__name__})"
        return {"verdict": "refused", "rule": "exception", "message": message}
