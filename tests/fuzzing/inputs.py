"""Valid files to start from: tiny models, adapters, recipes, configs, data and a stored run."""

import ast
import contextlib
import functools
import gzip
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load

import sdjax
from tests.fuzzing.gguf_files import F32, Q8_0, in_gguf
from tests.fuzzing.torch_files import torch_file

PACKAGE = Path(sdjax.__file__).parent
TESTS = Path(__file__).parents[1]
RECIPES = TESTS / "merging" / "recipe" / "mergekit"
Folder = Mapping[str, bytes]
TINY = {"intermediate_size": 8, "hidden_size": 8, "head_dim": 4}
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, at any depth."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write(folder: Path, files: Folder) -> None:
    """Write files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (0, 0))  # merges are resumed only if their files are unchanged


def words(*modules: str) -> tuple[str, ...]:
    """Return the keys and short strings in the source of modules or packages."""
    found: set[str] = set()
    for module in modules:
        path = PACKAGE / module
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
    return tuple(sorted(text for text in found if 0 < len(text) < 40 and " " not in text))


@functools.cache
def models() -> tuple[Folder, ...]:
    """Return a tiny model of every family, with a tokenizer and a chat template."""
    from sdjax.io.hf_checkpoint import write_model
    from sdjax.models.families import FAMILIES
    from sdjax.testing import tiny_model

    found = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            scalar = {"query_pre_attn_scalar": 8} if family.startswith("gemma") else {}
            write_model(folder, *tiny_model(family, **TINY, **scalar))
            found.append({**read(folder), **tokenizers()[0]})
    return tuple(found)


def in_torch_files(folder: Folder) -> Folder:
    """Return a model or an adapter with its weights in a file of torch.save."""
    names = {"model.safetensors": "pytorch_model.bin"}
    names["adapter_model.safetensors"] = "adapter_model.bin"
    return {
        names.get(name, name): torch_file(load(content)) if name in names else content
        for name, content in folder.items()
    }


@functools.cache
def gguf_models() -> tuple[Folder, ...]:
    """Return tiny models in GGUF files, one of them without config.json."""
    from sdjax.io.hf_checkpoint import write_model
    from sdjax.testing import tiny_model

    found = []
    for family, kind in (("llama", Q8_0), ("gemma3_text", F32)):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            write_model(folder, *tiny_model(family, hidden_size=32, intermediate_size=32))
            files = read(folder)
        config = json.loads(files["config.json"])
        content = in_gguf(config, load(files["model.safetensors"]), kind)
        found.append({"config.json": files["config.json"], "model.gguf": content})
    return (*found, {"model.gguf": found[0]["model.gguf"]})


@functools.cache
def tokenizers() -> tuple[Folder, ...]:
    """Return the files of a tokenizer of each type of model, with at most 64 tokens."""
    from tokenizers import Tokenizer as T
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    letters = ["<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .+-*/=()|_"]
    words = {text: index for index, text in enumerate([*letters, "th", "the", "##e", "▁"])}
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r" ?\w+|\s+", "isolated"), pre_tokenizers.Digits()]
    )
    clean = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    plain, bytewise, spaced, pieces = (
        T(models.BPE(words, [("t", "h"), ("th", "e")], unk_token="<unk>")),
        T(models.BPE({"Ġ": 0, "t": 1, "h": 2, "th": 3}, [("t", "h")])),
        T(models.Unigram([(text, -float(i)) for i, text in enumerate(words)], 0, True)),
        T(models.WordPiece(words, unk_token="<unk>", max_input_chars_per_word=20)),
    )
    plain.pre_tokenizer, plain.decoder = split, decoders.Fuse()
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    spaced.normalizer, spaced.pre_tokenizer = clean, pre_tokenizers.Metaspace()
    spaced.decoder = decoders.Metaspace()
    pieces.normalizer, pieces.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    for backend in (plain, bytewise, spaced, pieces):
        backend.add_special_tokens(["<s>", "</s>"])
        token = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[token])
    return tuple(_tokenizer_files(backend) for backend in (plain, bytewise, spaced, pieces))


@functools.cache
def sentencepiece_models() -> tuple[Folder, ...]:
    """Return models whose tokenizers are SentencePiece models alone."""
    folder = TESTS / "io" / "sentencepiece_references"
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    files = models()[0].items()
    plain = {name: content for name, content in files if "token" not in name}
    plain["tokenizer_config.json"] = json.dumps(settings).encode()
    return tuple({**plain, "tokenizer.model": p.read_bytes()} for p in folder.glob("*.model"))


def _tokenizer_files(backend: Any) -> Folder:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": TEMPLATE}
    end = backend.token_to_id("</s>")
    added = {str(end): {"content": "</s>", "special": True, "lstrip": False}}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings | {"added_tokens_decoder": added}).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
        "generation_config.json": f'{{"eos_token_id": [{end}], "pad_token_id": 0}}'.encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


@functools.cache
def sharded() -> Folder:
    """Return a tiny model with its weights in several files."""
    from sdjax.io.hf_checkpoint import write_model
    from sdjax.testing import tiny_model

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_model(folder, *tiny_model(), max_file_bytes=4_096)
        return read(folder)


@functools.cache
def adapters() -> tuple[Folder, ...]:
    """Return adapters for the first tiny model, and one of mergekit's tests."""
    import jax

    from sdjax.io.peft import write_adapter
    from sdjax.models.lora import init_adapter
    from sdjax.testing import tiny_config

    config = tiny_config(**TINY)
    adapter = init_adapter(config, jax.random.key(0), rank=2, alpha=4.0)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        write_adapter(folder, config, adapter, base="base")
        plain = read(folder)
    settings = json.loads(plain["adapter_config.json"])
    settings |= {"alpha_pattern": {"q_proj": 3, r"layers\.1\..*": 1}, "use_rslora": True}
    patterns = json.dumps(settings | {"modules_to_save": ["lm_head"]}).encode()
    return plain, in_torch_files({**plain, "adapter_config.json": patterns})


def data_rows() -> Iterable[tuple[str, list[dict]]]:
    """Yield the rows of a data file for each task, and of training and results files."""
    yield "gsm8k.jsonl", [{"question": f"{n} + 1?", "answer": f"x\n#### {n + 1}"} for n in range(4)]
    yield "svamp.jsonl", [
        {"ID": str(n), "Body": "Two.", "Question": "Sum?", "Answer": 2.0 * n, "Equation": "1 + 1",
         "Type": "Addition", "question_concat": "Two. Sum?"}
        for n in range(4)
    ]  # fmt: skip
    yield "math.jsonl", [
        {"problem": f"${n}$?", "solution": rf"so \boxed{{\frac{{{n}}}{{2}}}}", "level": "Level 1",
         "type": "Algebra"}
        for n in range(4)
    ]  # fmt: skip
    yield "questions.jsonl", [
        {"question": "a?", "answer": "x y", "kind": "k"}, {"question": "b?", "answer": 3}
    ]  # fmt: skip
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    yield "sft.jsonl", [{"prompt": "a", "completion": "b"}, {"messages": chat}]
    yield (
        "dpo.jsonl",
        [
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "c"}]},
        ],
    )
    result = {
        "id": "test-0",
        "kind": "k",
        "question": "a",
        "answer": "1",
        "prompt_sha256": hashlib.sha256().hexdigest(),
    }
    result |= {"output": "1", "strict_answer": "1", "flexible_answer": None}
    result |= {"strict": True, "flexible": True, "failure": None}
    yield "results.jsonl", [result, result | {"id": "test-1", "strict": False}]


def jsonl(rows: Iterable[dict]) -> bytes:
    """Return the content of a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@functools.cache
def training_programs() -> Folder:
    """Return the files of the programs that a generator was trained on, shortened."""
    import io

    import numpy as np

    fields = {"contract": "x", "texts": ["def merge_models(task_vectors):\n    return 0", "b"]}
    identities = io.BytesIO()
    np.save(identities, np.arange(3, dtype=np.uint64))
    return {
        "training_programs.json.gz": gzip.compress(json.dumps(fields).encode(), mtime=0),
        "training_programs.npy": identities.getvalue(),
    }


@functools.cache
def run() -> Folder:
    """Return a run folder, in the current version of the database."""
    import shutil

    from sdjax.search.store import Store

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        shutil.copytree(TESTS / "search" / "stored" / "jax-0.10.2", folder)
        with Store.open(folder, write=True):
            pass
        with contextlib.closing(sqlite3.connect(folder / "run.sqlite")) as connection, connection:
            # A seed that lists no training programs, among which a report would search.
            connection.execute("UPDATE run SET config = replace(config, 'zoo:seed', 'zoo:judge')")
        content = (folder / "run.sqlite").read_bytes()
    # Without the WAL, whose two bytes of the header mutations would need to agree on.
    return {"run.sqlite": content[:18] + b"\1\1" + content[20:]}


@functools.cache
def checkpoint() -> Folder:
    """Return a folder of checkpoints of a generator."""
    import jax

    from sdjax.io.orbax import GeneratorCheckpoints
    from sdjax.models.lora import init_adapter
    from sdjax.testing import tiny_config

    adapter = init_adapter(tiny_config(), jax.random.key(0), rank=2, alpha=4.0)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "generators"
        checkpoints = GeneratorCheckpoints(folder)
        checkpoints.save_adapter(1, adapter, score=0.5, metadata={"pairs": 3})
        checkpoints.close()
        return read(folder)


@functools.cache
def cached_array() -> bytes:
    """Return a file of `sdjax.training.checkpoints.cached_array`."""
    import numpy as np

    from sdjax.training.checkpoints import cached_array

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npz"
        cached_array(path, {}, lambda: np.ones(3), {})
        return path.read_bytes()


def merge_base(folder: Path, on_tensor: Callable[[int, int], None] | None = None) -> int:
    """Copy "base" of the working directory by a merge, to "merged" in a folder.

    Returns:
        number of tensors that an interrupted merge had written.
    """
    from sdjax.merging.recipe.pipeline import merge_recipe

    recipe = folder / "recipe" / "recipe.yaml"
    text = b"merge_method: passthrough\nmodels: [{model: base}]\n"
    write(recipe.parent, {recipe.name: text})
    return merge_recipe(recipe, folder / "merged", on_tensor=on_tensor).resumed


class _Interrupted(Exception):
    pass


@functools.cache
def partial_merge() -> Folder:
    """Return the folder of a merge that was interrupted after a few tensors."""
    from sdjax.io.atomic_write import partial_path

    def interrupt(done: int, total: int) -> None:
        if done == total // 2:
            raise _Interrupted

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write(Path("base"), models()[0])
        with contextlib.suppress(_Interrupted):
            merge_base(Path(folder), interrupt)
        return read(partial_path(Path(folder) / "merged"))
