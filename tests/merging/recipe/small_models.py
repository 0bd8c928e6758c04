"""Tiny models, recipes and readers that the tests of recipes share."""

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.norm.weight": (4,),
}
SAME = "model.norm.weight"


def write(tmp_path, text):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return path


def read(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            out.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return out


def wide(x):
    return np.asarray(x, np.float64)


TASK_ARITHMETIC = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: math
    parameters:
      weight: 0.5
  - model: code
    parameters: {weight: -0.25}
parameters:
  int8_mask: true
  lambda: 2.0
dtype: float32
"""


def rewrite(folder, tensors, **changes):
    save_file({**tensors, **changes}, folder / "model.safetensors")


class Stopped(Exception):
    """Raised in place of killing the process."""
