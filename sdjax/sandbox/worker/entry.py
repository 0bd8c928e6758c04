"""Job of the sandbox's workers: takes source text, returns its IR or a refusal as JSON."""

import importlib
import json
import os
from collections.abc import Callable

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature


def prepare(signature_json: str) -> Callable[[bytes], bytes]:
    """Warm up the server and return the function that a worker runs.

    Imports and traces what candidates commonly use, so that workers start with warm caches.

    Args:
        signature_json: result of `MergeSignature.to_json`.
    """
    # Tracing needs no backend, and a backend's threads would not survive a fork.
    os.environ["JAX_PLATFORMS"] = "none"
    import jax

    from sdjax.sandbox.worker import imports, warmup

    signature = MergeSignature.from_json(signature_json)
    jax.config.update("jax_platforms", "none")
    jax.config.update("jax_traceback_filtering", "off")
    for module in sorted(imports.IMPORTS):
        importlib.import_module(module)
    warmup.warm_up(signature)
    return lambda source: json.dumps(_trace(source, signature)).encode()


def _trace(source: bytes, signature: MergeSignature) -> dict[str, str]:
    from sdjax.sandbox.worker.trace import trace_source

    try:
        return {"ir": trace_source(source.decode("utf-8", "surrogatepass"), signature)}
    except Refusal as refusal:
        return {"verdict": refusal.verdict, "rule": refusal.rule, "message": refusal.message}
    except MemoryError:
        message = "the program takes too much memory"
        return {"verdict": "too costly", "rule": "memory", "message": message}
    except Exception as error:  # raised by Python before the candidate runs
        message = f"the program cannot be read ({type(error).__name__})"
        return {"verdict": "refused", "rule": "exception", "message": message}
