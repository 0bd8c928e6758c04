"""Tracer that converts candidates to IR by calling them on abstract tensors.

Nothing is computed: `jax.make_jaxpr` calls the Python function with tracers. The module's code is
executed inside every trace, so that top-level arrays are traced too and no state survives a trace.
"""

import ast
import builtins
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.sandbox.ir.calling_convention import IR_VERSION, CallingConvention, trace_plan
from sdjax.sandbox.ir.encode import Encoder
from sdjax.sandbox.ir.hashes import canonical
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.worker import rules
from sdjax.sandbox.worker.requested_inputs import RequestedInputs
from sdjax.sandbox.worker.step_budget import COUNTER, insert_step_counter, step_counter

FILENAME = "<program>"
Loader = Callable[[], Callable]


def trace_source(source: str, signature: MergeSignature) -> str:
    """Return the IR (JSON text) of an untrusted candidate. Call it in a worker only.

    Raises:
        Refusal: the candidate breaks a rule, cannot be traced or exceeds a limit.
    """
    tree = rules.check_text(source, signature.limits.source_bytes)
    return _trace(_loader(tree, signature.limits.step_budget), rules.entry_point(tree), signature)


def trace_trusted(program: str | Callable, signature: MergeSignature) -> str:
    """Return the IR of a trusted source text or function, traced in this process.

    For source text from sdjax's own grammar and for human-designed methods. Takes the same steps as
    a worker, without confinement.

    Raises:
        Refusal: see `trace_source`.
    """
    if isinstance(program, str):
        return trace_source(program, signature)
    name = "merge_trees" if program.__name__ == "merge_trees" else "merge_models"
    return _trace(lambda: program, name, signature)


def _loader(tree: ast.Module, step_budget: int) -> Loader:
    name = rules.entry_point(tree)
    try:
        code = compile(insert_step_counter(tree), FILENAME, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise Refusal("refused", "syntax", f"line {line}: {error}") from None

    def load() -> Callable:
        namespace: dict[str, Any] = {"__builtins__": _builtins(), "__name__": "program"}
        namespace[COUNTER] = step_counter(step_budget)
        exec(code, namespace)
        return namespace[name]

    return load


def _builtins() -> dict[str, Any]:
    """Return Python's builtins except those that the text rules forbid.

    `__import__` is kept, because NumPy's C code imports lazily through the calling frame.
    """
    refused = rules.NAMES_REFUSED - {"__import__", "getattr"}
    return {name: value for name, value in vars(builtins).items() if name not in refused}


# --- tracing ---------------------------------------------------------------------------------


def _trace(load: Loader, name: str, signature: MergeSignature) -> str:
    form = "tree" if name == "merge_trees" else "tensor"
    if form == "tree" and not signature.paths:
        raise Refusal(
            "wrong signature", "tree", "merge_trees needs a merge signature with tensor paths"
        )
    requested = _guarded(lambda: _read_inputs(load, form, signature), signature)
    encoder = Encoder(signature.limits)
    by_kind = "kind" in requested.requests
    plan = trace_plan(signature, form, by_kind)
    blocks = {
        of: _block(load, requested, of, convention, encoder, signature)
        for of, convention in plan.required.items()
    }
    encoder.start_probes()
    for of, convention in plan.optional.items():
        try:
            blocks[of] = _block(load, requested, of, convention, encoder, signature)
        except Refusal as refusal:  # it may work only at the real shapes
            real = next(real for reduced, real in plan.probes if reduced == of)
            _check_probed_at_real_shapes(plan.required[real], refusal, signature)
    if by_kind:
        blocks = _without_unused_kind(blocks, signature)
    message = {
        "version": IR_VERSION,
        "form": form,
        "hyperparameters": requested.scalars,
        "constants": encoder.constants,
        "programs": [{"of": of, "block": block} for of, block in blocks.items()],
    }
    return canonical(message)


def _check_probed_at_real_shapes(
    convention: CallingConvention, refusal: Refusal, signature: MergeSignature
) -> None:
    """Refuse a candidate that fails at reduced shapes if the real ones are too large to probe."""
    if convention.elements > signature.limits.max_probe_elements:
        reason = f"it fails at the smaller shapes of the probe tensors: {refusal.message}"
        raise Refusal("wrong signature", "probe", f"{reason}; take sizes from the arguments")


def _block(
    load: Loader,
    requested: RequestedInputs,
    of: Any,
    convention: CallingConvention,
    encoder: Encoder,
    signature: MergeSignature,
) -> dict:
    jaxpr = _guarded(lambda: _jaxpr(load, requested, of, convention, signature), signature)
    if jaxpr.effects:
        raise Refusal("refused", "effects", "the program has side effects (print, callback)")
    return _guarded(lambda: encoder.block(jaxpr), signature)


def _read_inputs(load: Loader, form: str, signature: MergeSignature) -> RequestedInputs:
    result: list[RequestedInputs] = []

    def read() -> None:
        result.append(RequestedInputs.of(load(), form, signature))

    jax.eval_shape(read)  # inside a trace, so that top-level arrays stay abstract
    return result[0]


def _jaxpr(
    load: Loader,
    requested: RequestedInputs,
    of: Any,
    convention: CallingConvention,
    signature: MergeSignature,
) -> Any:
    names = tuple(requested.scalars)

    def call(*inputs: Any) -> tuple:
        task_vectors, available = _unpack(convention, inputs, names)
        available["kind"] = of[0]
        keywords = requested.keywords(available, signature)
        return tuple(_checked(load()(task_vectors, **keywords), convention))

    # Matrix products in full float32 on every platform, as in the merge engine.
    with jax.default_matmul_precision("highest"):
        return jax.make_jaxpr(call)(*convention.avals(names))


def _unpack(
    convention: CallingConvention, inputs: Sequence[Any], hyperparameters: Sequence[str]
) -> tuple[dict, dict]:
    """Split the flat arguments; the inverse of `CallingConvention.pack`.

    Returns:
        the task vectors by slot, and all inputs that a candidate may request by name.
    """
    n, slots = convention.num_leaves, convention.slots
    *task_vectors, base = (
        convention.result(inputs[i * n : (i + 1) * n]) for i in range(len(slots) + 1)
    )
    key, depth, *values = inputs[(len(slots) + 1) * n :]
    named = {"base": base, "key": key, "depth": depth}
    by_slot = dict(zip(slots, task_vectors, strict=True))
    return by_slot, named | dict(zip(hyperparameters, values, strict=True))


def _checked(result: Any, convention: CallingConvention) -> list[jax.Array]:
    """Return the leaves of the result as float32; raise Refusal if it has the wrong form."""
    if convention.paths is None:
        return [_checked_leaf(result, convention.shapes[0], "")]
    if not isinstance(result, dict):
        kind = type(result).__name__
        raise _wrong("tree", f"merge_trees must return a dict from path to tensor, not {kind}")
    for path in convention.paths:
        if path not in result:
            raise _wrong("tree", f"the result has no tensor `{path}`")
    for path in result:
        if path not in convention.paths:
            raise _wrong("tree", f"the result has a tensor `{path}` that the model does not have")
    pairs = zip(convention.paths, convention.shapes, strict=True)
    return [_checked_leaf(result[path], shape, f" for `{path}`") for path, shape in pairs]


def _checked_leaf(result: Any, shape: tuple[int, ...], location: str) -> jax.Array:
    if isinstance(result, (dict, list, tuple)) or result is None:
        kind = type(result).__name__
        raise _wrong("tree", f"the result{location} must be one array, not {kind}")
    if not isinstance(result, (jax.Array, np.ndarray, np.generic, int, float, bool)):
        kind = type(result).__name__
        raise _wrong("type", f"the result{location} must be an array, not {kind}")
    if jnp.shape(result) != shape:
        message = f"the result{location} has shape {jnp.shape(result)}; expected {shape}"
        raise _wrong("shape", message)
    dtype = jnp.result_type(result)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise _wrong("type", f"the result{location} has dtype {dtype}; expected a float tensor")
    return jnp.asarray(result, jnp.float32)


def _wrong(rule: str, message: str) -> Refusal:
    return Refusal("wrong signature", rule, message)


def _without_unused_kind(blocks: dict, signature: MergeSignature) -> dict:
    """Drop the kind from the names if it changes nothing, as if it had not been requested."""
    by_shape: dict[tuple[int, ...], dict] = {}
    for (_, shape), block in blocks.items():
        if by_shape.setdefault(shape, block) != block:
            return blocks
    plan = trace_plan(signature, "tensor", by_kind=False).all
    return {name: by_shape[name[1]] for name in plan if name[1] in by_shape}


# --- error messages --------------------------------------------------------------------------


def _guarded(step: Callable[[], Any], signature: MergeSignature) -> Any:
    """Run a step that executes the candidate's code; turn any exception into a Refusal."""
    try:
        return step()
    except Refusal:
        raise
    except MemoryError:
        raise Refusal("too costly", "memory", "the program takes too much memory") from None
    except RecursionError:
        raise Refusal("refused", "recursion", "the program recurses too deeply") from None
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        kind = type(error).__name__
        raise Refusal("refused", "exception", f"the program raised {kind}") from None
    except Exception as error:
        raise _explain(error, signature) from None


def _explain(error: Exception, signature: MergeSignature) -> Refusal:
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == FILENAME]
    at = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return Refusal(
            "refused",
            "traced-branch",
            f"{at}`if`, `while`, `and`, `or` and `not` need a Python bool, but this value is an"
            " array whose value is unknown while tracing (tensors, depth, float hyperparameters);"
            " select with jnp.where(condition, a, b), e.g. jnp.where(depth < 0.5, a, b)",
        )
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return Refusal(
            "refused",
            "concrete-value",
            f"{at}NumPy cannot compute on traced arrays; use jax.numpy (jnp) instead",
        )
    if isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        return Refusal(
            "refused",
            "concrete-value",
            f"{at}an array cannot be indexed by a mask, as the result's shape would depend on"
            " values; use jnp.where(mask, x, 0.0) instead",
        )
    if isinstance(error, jax.errors.ConcretizationTypeError) and "size argument" in str(error):
        return Refusal(
            "refused",
            "concrete-value",
            f"{at}the shape of this result would depend on values; pass size=, or use"
            " jnp.where(mask, x, 0.0) instead",
        )
    if isinstance(error, jax.errors.ConcretizationTypeError):
        return Refusal(
            "refused",
            "concrete-value",
            f"{at}a Python number is needed here (float, int, range, a shape, k), but this value"
            " is an array whose value is unknown while tracing; compute with jnp, or from x.shape",
        )
    text = str(error).strip().split("\n")[0]
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in text:
        return Refusal("refused", "host", f"{at}the program tries to use a device or the host")
    if isinstance(error, TypeError) and "item assignment" in text:
        return Refusal(
            "refused",
            "in-place",
            f"{at}arrays cannot be changed in place; use x = x.at[index].set(value)",
        )
    hint = ""
    if isinstance(error, KeyError):
        hint = f"; the experts in task_vectors are {', '.join(signature.slots)}"
    return Refusal("refused", "exception", f"{at}{type(error).__name__}: {text}{hint}")
