"""Length of a tensor's path through `sdjax merge` (docs/internals/merging.md lists it)."""

import json
import re
import sys
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

import sdjax
from sdjax.cli.merge import merge
from sdjax.merging.recipe import pipeline
from sdjax.merging.recipe.plan import MergeStep, TensorRef
from sdjax.models.tensor_names import parse_name

MAX_STOPS = 20
NAME, PATH, SHAPE = "model.layers.0.mlp.up_proj.weight", "layers/0/mlp/up_proj", (6, 4)
SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    NAME: SHAPE,
    "model.layers.0.mlp.down_proj.weight": (4, 5),
    "model.norm.weight": (4,),
}
PACKAGE = Path(sdjax.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "internals" / "merging.md"


class SynchronousExecutor:
    """Executor that runs each call when it is submitted, so that its callers are on the stack."""

    def __init__(self, max_workers=None):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **options):
        pass


def is_tensor(value):
    """Return whether a value is the tensor: its name, path, step, reference or values."""
    if isinstance(value, str):
        return value in (NAME, PATH)
    if isinstance(value, MergeStep | TensorRef):
        return value.name == NAME
    if isinstance(value, list | tuple):
        return bool(value) and all(is_tensor(item) for item in value)
    array = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer)
    return array and value.shape == SHAPE


def qualified(frame):
    """Return the name of a function of sdjax; None for other code and for comprehensions."""
    code = frame.f_code
    file = Path(code.co_filename)
    if not file.is_relative_to(PACKAGE) or re.search("<(genexpr|.*comp)>$", code.co_qualname):
        return None
    module = file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    return f"{module}.{code.co_qualname.replace('.<locals>', '')}"


def test_tensor_passes_at_most_20_functions_from_command_to_disk(tmp_path, monkeypatch):
    """Count the functions that receive the tensor as an argument, and all of their callers."""
    rng = np.random.default_rng(0)
    for model in ("base", "expert"):
        (tmp_path / model).mkdir()
        tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        save_file(tensors, tmp_path / model / "model.safetensors")
        (tmp_path / model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: base\n"
        "models: [{model: expert, parameters: {weight: 0.5}}]\n"
    )
    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", SynchronousExecutor)
    jax.devices()
    parse_name.cache_clear()
    stops = {}

    def profile(frame, event, _):
        if event != "call" or qualified(frame) is None:
            return
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)  # *args
        if not any(is_tensor(frame.f_locals.get(name)) for name in code.co_varnames[:count]):
            return
        callers = []
        while frame is not None:
            callers.append(qualified(frame))
            frame = frame.f_back
        stops.update(dict.fromkeys(name for name in reversed(callers) if name))

    sys.setprofile(profile)
    try:
        merge.main([str(recipe), str(tmp_path / "out")], standalone_mode=False)
    finally:
        sys.setprofile(None)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    listed = re.findall(r"^\d+\. `([\w.<>]+)`", DOCUMENT.read_text(), re.M)
    assert list(stops) == listed
    assert len(stops) <= MAX_STOPS
