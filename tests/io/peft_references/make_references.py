"""Write references.json: adapters of PEFT and the weights into which PEFT merges them.

Run it in an environment with PEFT 0.21.2 and PyTorch 2.13:

    python tests/io/peft_references/make_references.py

Factors are random multiples of 1/8, so that PEFT's float32 arithmetic is almost exact.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from torch import nn


def numbers(*shape):
    draws = np.random.default_rng(sum(shape)).integers(-8, 9, shape)
    return torch.from_numpy(draws.astype(np.float32) / 8)


class Experts(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        up, down = ((2, 3, 4), (2, 2, 3)) if is_transposed else ((2, 4, 3), (2, 3, 2))
        self.gate_up_proj = nn.Parameter(numbers(*up))
        self.down_proj = nn.Parameter(numbers(*down))
        self.is_transposed = is_transposed


class Model(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        self.embedding = nn.Embedding(4, 3)
        self.linear.weight.data = numbers(2, 3)
        self.embedding.weight.data = numbers(4, 3)
        self.experts = Experts(is_transposed)


def reference(is_transposed=False, **settings):
    model = Model(is_transposed)
    before = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **settings))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data = 1.5 * parameter.data + 0.25
        elif "lora_" in name:
            parameter.data = numbers(*parameter.shape)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        stored = load_file(Path(folder) / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
    merged = adapted.merge_and_unload().state_dict()
    return {
        "model": before,
        "settings": {key: value for key, value in config.items() if value not in (None, {}, [])},
        "adapter": {name: tensor.tolist() for name, tensor in stored.items()},
        "merged": {name: tensor.tolist() for name, tensor in merged.items()},
    }


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
REFERENCES = {
    "lora": reference(target_modules=["linear", "embedding"]),
    "dora": reference(target_modules=["linear", "embedding"], use_dora=True),
    "dora, rslora": reference(target_modules=["linear"], use_dora=True, use_rslora=True),
    "parameters": reference(**EXPERTS),
    "parameters, [in, out]": reference(is_transposed=True, **EXPERTS),
    "one parameter, alpha of its own": reference(
        target_modules=["linear"],
        target_parameters=["experts.down_proj"],
        alpha_pattern={"experts.down_proj": 5},
        rank_pattern={"linear": 1},
    ),
}

if __name__ == "__main__":
    path = Path(__file__).with_name("references.json")
    path.write_text(json.dumps(REFERENCES) + "\n")
