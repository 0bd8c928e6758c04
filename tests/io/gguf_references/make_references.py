"""Write references.json: random blocks of each quantized type, and the numbers they stand for.

Run it in an environment with gguf 0.19.0, the Python package of llama.cpp:

    python tests/io/gguf_references/make_references.py
"""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES += ("IQ4_NL", "IQ4_XS")


def reference(name):
    """Return two blocks whose scales are finite, and the float32 numbers in them."""
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    while True:
        blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            numbers = dequantize(blocks, kind)
        if np.isfinite(numbers).all() and 1e-3 < np.abs(numbers).max() < 1e4:
            break
    assert numbers.shape == (2, elements)
    assert numbers.dtype == np.float32
    return {
        "type": kind.value,
        "elements": elements,
        "blocks": blocks.tobytes().hex(),
        "numbers": numbers.tobytes().hex(),
    }


if __name__ == "__main__":
    references = {name: reference(name) for name in TYPES}
    Path(__file__).with_name("references.json").write_text(json.dumps(references, indent=1) + "\n")
