"""Kinds: the files of models, tokenizers and adapters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fuzzing import inputs, mutations
from tests.fuzzing.config_kinds import plan_files
from tests.fuzzing.inputs import Folder
from tests.fuzzing.kinds import Kind, Load
from tests.fuzzing.mutations import Mutate

ALONE = "merge_method: passthrough\nmodels: [{model: MODEL}]\nchat_template: auto\n"
UNION = (
    "merge_method: linear\nmodels: [{model: MODEL}, {model: base}]\nparameters: {weight: 1}\n"
    "tokenizer_source: union\nchat_template: auto\n"
)
# Words of formats whose readers are libraries.
_TOKENIZERS = (
    *("BPE", "WordPiece", "Unigram", "WordLevel", "ByteLevel", "Metaspace", "Sequence", "NFC"),
    *("Split", "Replace", "Strip", "Prepend", "Precompiled", "Lowercase", "Regex", "ByteFallback"),
    *("BertProcessing", "TemplateProcessing", "CTC", "Fuse", "LlamaTokenizer", "BertTokenizer"),
    *("ignore_merges", "fuse_unk", "dropout", "byte_fallback", "truncation", "padding", "(a|a)*$"),
)
_TOKENIZER_SETTINGS = (
    *("tokenizer_class", "processor_class", "auto_map", "AutoTokenizer", "AutoModelForCausalLM"),
    *("CLIPModel", "LlamaForCausalLM", "RagTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"),
    *("fast_tokenizer_files", "../outside/tokenizer.4.0.0.json", "tokenizer.4.0.0.json"),
    *("tokenizer_file", "vocab_file", "merges_file", "gguf_file", "init_inputs", "sp_model_kwargs"),
)
_JINJA = (
    *("{{", "}}", "{% for m in messages %}", "{% endfor %}", "range(9999)", "loop", "|join"),
    *("messages", "namespace(a=0)", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "cycler"),
    *("lipsum(9999)", "'x' * 9**9", "9**9**9", "m.__class__", "{% include 'x' %}", "tojson"),
)


def config_json() -> Kind:
    """config.json of a model."""
    return _model_kind(
        {"config.json": mutations.mutate_json},
        [(open_model, 1), (plan_merge, 1)],
        inputs.words("models/hf_config.py", "models/families.py", "models/rope.py")
        + inputs.words("merging/recipe/tensor_roles.py", "merging/recipe/compatibility.py"),
    )


def generation_config() -> Kind:
    """generation_config.json of a model."""
    return _model_kind(
        {"generation_config.json": mutations.mutate_json},
        [(use_tokenizer, 1), (plan_merge, 4)],
        inputs.words("io/tokenizer.py"),
    )


def tokenizer_json() -> Kind:
    """tokenizer.json of a model."""
    loaders = [(use_tokenizer, 1), (plan_union, 4), (use_full_tokenizer, 40)]
    return _tokenizer_kind(["tokenizer.json"], loaders)


def tokenizer_config() -> Kind:
    """tokenizer_config.json and special_tokens_map.json of a model."""
    loaders = [(use_tokenizer, 1), (plan_union, 2), (use_full_tokenizer, 20)]
    return _tokenizer_kind(["tokenizer_config.json", "special_tokens_map.json"], loaders)


def sentencepiece() -> Kind:
    """SentencePiece model of a folder without tokenizer.json."""
    return Kind(
        folders=inputs.sentencepiece_models(),
        formats={"tokenizer.model": mutations.mutate_bytes},
        loaders=[(use_tokenizer, 1), (plan_union, 4)],
        shared=shared_model(),
    )


def chat_template() -> Kind:
    """Chat template of a model."""
    return _model_kind({"chat_template.jinja": mutations.mutate_text}, [(render_chat, 1)], _JINJA)


def safetensors() -> Kind:
    """Weights of a model."""
    return _model_kind(
        {"model.safetensors": mutations.mutate_safetensors},
        [(read_tensors, 1), (open_model, 1), (plan_merge, 4), (merge_folder, 200)],
        (*inputs.words("io/safetensors_writer.py", "models/params.py"), "BF16", "F64", "I64", "F8"),
    )


def torch_weights() -> Kind:
    """Weights of a model and of an adapter in files of torch.save."""
    return Kind(
        folders=[inputs.in_torch_files(folder) for folder in inputs.models()[:2]],
        formats={"pytorch_model.bin": mutations.mutate_torch},
        loaders=[(open_model, 1), (read_tensors, 1), (plan_merge, 8)],
        words=inputs.words("io/torch_pickle.py", "io/torch_file.py", "models/params.py"),
        shared=shared_model(),
    )


def gguf() -> Kind:
    """Weights of a model in a GGUF file, with and without config.json."""
    return Kind(
        folders=inputs.gguf_models(),
        formats={"model.gguf": mutations.mutate_gguf},
        loaders=[(open_model, 1), (read_tensors, 1), (plan_merge, 8)],
        words=inputs.words("io/gguf_file.py", "io/gguf_names.py"),
        shared=shared_model(),
    )


def index() -> Kind:
    """Index of a model with several files of weights."""
    return Kind(
        folders=[inputs.sharded()],
        formats={"model.safetensors.index.json": mutations.mutate_json},
        loaders=[(open_model, 1), (read_tensors, 1)],
        words=tuple(inputs.sharded()),
    )


def open_model(folder: Path) -> None:
    from sdjax.io.hf_checkpoint import ModelReader

    reader = ModelReader(folder)
    reader.check_shapes()
    for path in reader.specs:
        reader.read(path)


def read_tensors(folder: Path) -> None:
    from sdjax.io.weights import open_model_weights

    reader = open_model_weights(folder)
    reader.infos(reader.names)
    for name in reader.names:
        reader.read(name)


def plan_merge(folder: Path) -> None:
    plan_files(_write_recipe(folder, ALONE))


def plan_union(folder: Path) -> None:
    plan_files(_write_recipe(folder, UNION), allow_crimes=True)


def merge_folder(folder: Path) -> None:
    from sdjax.merging.recipe.pipeline import merge_recipe

    merge_recipe(_write_recipe(folder, ALONE), folder.parent / "merged")


def _write_recipe(folder: Path, recipe: str) -> Path:
    path = folder.parent / "recipe" / "recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe.replace("MODEL", str(folder)))
    return path


def use_tokenizer(folder: Path) -> None:
    from sdjax.io.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    for text in ("the 12 + 3", "", "a" * 300, "\x00é\U0001f600<s></s>"):
        ids = tokenizer.encode(text, add_special=True)
        tokenizer.decode(ids)
        tokenizer.decode([0, 10**6], skip_special=False)


def use_full_tokenizer(folder: Path) -> None:
    from sdjax.io.tokenizer import load_full_tokenizer

    load_full_tokenizer(folder)


def render_chat(folder: Path) -> None:
    from sdjax.io.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.render_chat([{"role": "user", "content": "a"}])


def adapter() -> Kind:
    """Adapter of a model."""
    return Kind(
        folders=inputs.adapters(),
        formats={
            "adapter_config.json": mutations.mutate_json,
            "adapter_model.safetensors": mutations.mutate_safetensors,
            "adapter_model.bin": mutations.mutate_torch,
        },
        loaders=[(use_adapter, 1), (read_adapted, 1)],
        words=(
            *inputs.words("io/peft.py", "io/lora_alpha.py", "models/lora.py"),
            "(a+)+$",
            ".*",
            "(",
            "q_proj|v_proj",
        ),
        shared=shared_model(),
    )


def use_adapter(folder: Path) -> None:
    from sdjax.io.hf_checkpoint import load_config
    from sdjax.io.peft import has_plain_factors, read_adapter

    config = load_config(Path("base"))
    if has_plain_factors(folder, config):
        read_adapter(folder, config, model=Path("base"))


def read_adapted(folder: Path) -> None:
    from sdjax.io.hf_checkpoint import ModelReader

    reader = ModelReader(Path("base"), adapter=folder)
    for path in reader.specs:
        reader.read(path)


def training_programs() -> Kind:
    """List of the programs that a generator was trained on."""
    return Kind(
        folders=[inputs.training_programs()],
        formats={
            "training_programs.json.gz": mutations.mutate_gzip,
            "training_programs.npy": mutations.mutate_bytes,
        },
        loaders=[(read_programs, 1)],
        words=("contract", "texts"),
    )


def read_programs(folder: Path) -> None:
    from sdjax.io.training_programs import (
        read_training_identities,
        read_training_programs,
        read_training_sources,
    )
    from sdjax.report.nearest import nearest_texts

    nearest_texts({"a": "def f(): pass"}, read_training_sources(folder) or ())
    programs = read_training_programs(folder)
    read_training_identities(folder, "x")
    if programs is not None:
        programs.union(programs)


def _tokenizer_kind(names: Sequence[str], loaders: Sequence[tuple[Load, int]]) -> Kind:
    model = inputs.models()[0]
    return Kind(
        folders=[{**model, **files} for files in inputs.tokenizers()],
        formats=dict.fromkeys(names, mutations.mutate_json),
        loaders=loaders,
        words=(
            *inputs.words("io/tokenizer.py", "io/tokenizer_settings.py", "io/model_files.py"),
            *(*_TOKENIZERS, *_TOKENIZER_SETTINGS),
        ),
        shared=shared_model(),
    )


def _model_kind(
    formats: Mapping[str, Mutate], loaders: Sequence[tuple[Load, int]], words: Sequence[str]
) -> Kind:
    return Kind(
        folders=inputs.models(),
        formats=formats,
        loaders=loaders,
        words=words,
        shared=shared_model(),
    )


def shared_model() -> Folder:
    return {f"base/{name}": content for name, content in inputs.models()[0].items()}
