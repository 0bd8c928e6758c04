"""Generator of the models here and of the results of mergekit 0.1.5 that the tests compare with.

    python -m venv /tmp/mk && /tmp/mk/bin/pip install torch==2.13.0 && \
        /tmp/mk/bin/pip install mergekit==0.1.5
    CUDA_VISIBLE_DEVICES= /tmp/mk/bin/python tests/merging/recipe/mergekit/make_references.py

Every `recipes/NAME.yaml` is merged to `references/NAME.safetensors`. The conversations rendered by
mergekit's chat templates are in `references/chat_templates.json`. The models are random Llamas of a
few thousand float32 parameters: `base`, three fine-tunes of it (`math`, `code`, `chat`), an adapter
for it (`adapter`), a fine-tune with other tokens (`wide`), and a pair with one matrix for embedding
and output (`tied`, `tied_math`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
HIDDEN, INNER, LAYERS, VOCABULARY, KEY_VALUE = 8, 12, 3, 11, 4
TOKENS = ["<s>", "</s>", "<unk>", *"abcdefgh"]
WIDE_TOKENS = ["<s>", "</s>", "<unk>", "b", "a", *"cdefg", "<im>", "x"]  # no h, 2 new, 2 swapped


def shapes(vocabulary: int, tied: bool) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEY_VALUE, HIDDEN),
            "self_attn.v_proj": (KEY_VALUE, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            out[f"model.layers.{layer}.{name}.weight"] = shape
    out["model.norm.weight"] = (HIDDEN,)
    if not tied:
        out["lm_head.weight"] = (vocabulary, HIDDEN)
    return out


def write_model(name: str, tensors: dict[str, np.ndarray], tokens: list[str], tied: bool) -> None:
    folder = HERE / "models" / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}\n')
    special = [token for token in tokens if token.startswith("<")]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokens.index(token),
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}" + name + ": {{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def make_models() -> None:
    rng = np.random.default_rng(4)

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    base = {name: draw(shape, 1.0) for name, shape in shapes(VOCABULARY, False).items()}
    write_model("base", base, TOKENS, False)
    common = {name: draw(x.shape, 0.1) for name, x in base.items()}
    for name, scale in [("math", 0.1), ("code", 0.2), ("chat", 0.15)]:
        tuned = {n: x + common[n] + draw(x.shape, scale) for n, x in base.items()}
        # As after training: a third of the elements are unchanged, and so is one norm in two
        # models.
        for n, x in base.items():
            tuned[n] = np.where(rng.random(x.shape) < 0.33, x, tuned[n])
        if name != "chat":
            tuned["model.layers.1.input_layernorm.weight"] = base[
                "model.layers.1.input_layernorm.weight"
            ]
        write_model(name, tuned, TOKENS, False)
    wide = {n: draw(s, 1.0) for n, s in shapes(len(WIDE_TOKENS), False).items()}
    for n, x in base.items():
        wide[n] = x + draw(x.shape, 0.1) if wide[n].shape == x.shape else wide[n]
    write_model("wide", wide, WIDE_TOKENS, False)
    tied = {name: draw(shape, 1.0) for name, shape in shapes(VOCABULARY, True).items()}
    write_model("tied", tied, TOKENS, True)
    write_model("tied_math", {n: x + draw(x.shape, 0.1) for n, x in tied.items()}, TOKENS, True)
    make_adapter(draw)


def make_adapter(draw) -> None:
    folder = HERE / "models" / "adapter"
    folder.mkdir()
    rank, tensors = 2, {}
    for layer in range(LAYERS):
        for name, (out, into) in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = draw((rank, into), 0.3)
            tensors[f"{path}.lora_B.weight"] = draw((out, rank), 0.3)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["q_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def merge(recipe: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            str(Path(sys.executable).parent / "mergekit-yaml"),
            str(recipe),
            f"{scratch}/out",
            "--no-write-model-card",
            "--quiet",
            f"--lora-merge-cache={scratch}/lora",
        ]
        done = subprocess.run(command, cwd=HERE / "models", capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{recipe.name}: {done.stderr.strip().splitlines()[-1]}")
        tensors = {}
        for file in sorted(Path(scratch, "out").glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    # bfloat16 has no NumPy type without ml_dtypes; its values are float32's.
                    tensors[name] = opened.get_tensor(name).float().numpy()
        config = json.loads(Path(scratch, "out", "config.json").read_text())
        facts = {k: config[k] for k in ("num_hidden_layers", "vocab_size", "tie_word_embeddings")}
        if (Path(scratch, "out") / "tokenizer.json").exists():
            from transformers import AutoTokenizer

            vocabulary = AutoTokenizer.from_pretrained(f"{scratch}/out").get_vocab()
            facts["tokens"] = sorted(vocabulary, key=vocabulary.__getitem__)
        save_file(
            tensors,
            HERE / "references" / f"{recipe.stem}.safetensors",
            metadata={"facts": json.dumps(facts)},
        )


def render_chats() -> None:
    """Return conversations rendered by transformers with mergekit's own chat templates."""
    from importlib.resources import files

    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    contents = {"user": "hi \n", "assistant": " yo", "system": " be kind\n", "user_context": "see "}
    out = []
    for name in ("alpaca", "chatml", "exaone", "llama3", "mistral"):
        source = files("mergekit._data.chat_templates").joinpath(f"{name}.jinja").read_text()
        template = environment.from_string(source)
        for letters in ("u", "su", "ua", "uau", "suau", "suaua", "cu", "ucua"):
            if name == "mistral" and "c" in letters:
                continue  # it refuses other roles
            roles = {"u": "user", "a": "assistant", "s": "system", "c": "user_context"}
            messages = [{"role": roles[x], "content": contents[roles[x]]} for x in letters]
            for prompt in (False, True):
                variables = {"messages": messages, "add_generation_prompt": prompt}
                text = template.render(bos_token="<s>", eos_token="</s>", **variables)
                out.append({"name": name, **variables, "text": text})
    text = json.dumps(out, indent=1) + "\n"
    (HERE / "references" / "chat_templates.json").write_text(text)


def main() -> None:
    for folder in ("models", "references"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    (HERE / "references").mkdir()
    make_models()
    for recipe in sorted((HERE / "recipes").glob("*.yaml")):
        merge(recipe)
        print(recipe.stem, flush=True)
    render_chats()


if __name__ == "__main__":
    main()
