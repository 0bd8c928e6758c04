"""The kinds of files that may come from a stranger, and the functions that read them.

A kind has valid folders, the files of those that are mutated, and loaders. Each loader reads the
folder as a command would, and must end in a result or in a user error.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fuzzing import inputs, mutations
from tests.fuzzing.inputs import Folder
from tests.fuzzing.mutations import Mutate

Load = Callable[[Path], None]
RECIPE = "merge_method: linear\nmodels: [{model: MODEL}, {model: OTHER}]\ndtype: float32\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of files.

    Attributes:
        folders: valid folders to start from.
        formats: the files that are mutated, with the mutation of their format.
        loaders: the functions that read the folder; the second number says for one in how many
            inputs, since some take long.
        words: strings that mean something to the loaders.
        shared: files of the working directory, which the mutated files may name.
        writes: whether loaders write to the folder.
    """

    folders: Sequence[Folder]
    formats: Mapping[str, Mutate]
    loaders: Sequence[tuple[Load, int]]
    words: Sequence[str] = ()
    shared: Folder = dataclasses.field(default_factory=dict)
    writes: bool = False


# Configs and recipes


def run_config() -> Kind:
    """Config of a run."""
    texts = _configs(lambda name: not name.startswith("train-"))
    return Kind(
        folders=[{"run.yaml": text} for text in texts],
        formats={"run.yaml": mutations.mutate_yaml},
        loaders=[(read_run_config, 1), (plan_run_config, 200)],
        words=inputs.words("search/config.py", "decoding/config.py", "sandbox/config.py")
        + inputs.words("training/config.py", "evaluation/tasks", "sharding/config.py"),
    )


def read_run_config(folder: Path) -> None:
    from sdjax.search.announcement import tuned_method_count
    from sdjax.search.config import config_from, prompt_template, read_config
    from sdjax.search.grids import check_methods

    config = read_config(folder / "run.yaml")
    check_methods(config)
    tuned_method_count(config)
    prompt_template(config).render(
        slots=config.slots, descriptions={s: e.description for s, e in config.experts.items()}
    )
    assert config_from(config.to_json(), "stored") == config


def plan_run_config(folder: Path) -> None:
    from sdjax.search.announcement import announce
    from sdjax.search.config import read_config
    from sdjax.search.plan import plan_run

    announce(plan_run(read_config(folder / "run.yaml")))


def train_config() -> Kind:
    """Config of a training job."""
    texts = {
        kind: _configs(lambda name, kind=kind: name == f"train-{kind}")[0]
        for kind in ("sft", "dpo", "warmstart")
    }
    return Kind(
        folders=[{f"{kind}.yaml": text} for kind, text in texts.items()],
        formats={f"{kind}.yaml": mutations.mutate_yaml for kind in texts},
        loaders=[(read_train_config, 1)],
        words=inputs.words("training/config.py", "models/lora.py"),
    )


def read_train_config(folder: Path) -> None:
    from sdjax.cli.train import _rows
    from sdjax.core.config import read_dataclass
    from sdjax.training.config import JOBS, WarmstartJob

    path = next(folder.iterdir(), folder / "sft.yaml")
    job = read_dataclass(JOBS[path.stem], path)
    job.mesh.make(default_axis="fsdp")
    if not isinstance(job, WarmstartJob):
        _rows(job)


def recipe() -> Kind:
    """Recipe of a merge."""
    texts = [path.read_bytes() for path in sorted(inputs.RECIPES.glob("recipes/*.yaml"))]
    return Kind(
        folders=[{"recipe.yaml": text} for text in texts],
        formats={"recipe.yaml": mutations.mutate_yaml},
        loaders=[(plan_recipe_file, 1), (merge_recipe_file, 200)],
        words=inputs.words("merging/recipe", "merging/methods"),
        shared=inputs.read(inputs.RECIPES / "models"),
    )


def plan_recipe_file(folder: Path) -> None:
    _plan(folder / "recipe.yaml")


def merge_recipe_file(folder: Path) -> None:
    from sdjax.merging.recipe.pipeline import merge_recipe

    merge_recipe(folder / "recipe.yaml", folder.parent / "out")


def _plan(path: Path, *, allow_crimes: bool = False) -> Any:
    """Return the plan of a recipe, and write all files of the result except the tensors."""
    from sdjax.merging.recipe import output_files
    from sdjax.merging.recipe.pipeline import _fingerprint
    from sdjax.merging.recipe.model_card import RECIPE, Provenance, write_model_card
    from sdjax.merging.recipe.recipe_method import find_method
    from sdjax.merging.recipe.recipe_plan import plan_recipe
    from sdjax.merging.recipe.schema import read_recipe
    from sdjax.merging.recipe.source_models import open_source_model

    parsed = read_recipe(path)
    open_model = functools.cache(lambda name: open_source_model(name, path.parent))
    method, program = find_method(parsed, open_model)
    plan = plan_recipe(parsed, method, open_model, 0, allow_crimes=allow_crimes)
    template = output_files.resolve_chat_template(parsed, plan.models)
    provenance = Provenance(
        method=parsed.merge_method, file=RECIPE, text=parsed.text, seed=0, program=program
    )
    _fingerprint(plan, provenance, template)
    out = path.parent.parent / "out"
    out.mkdir(exist_ok=True)
    output_files.write_config(out, plan, {step.name: step.spec for step in plan.steps})
    output_files.write_tokenizer(out, plan.tokenizer, plan.template.folder, template)
    write_model_card(out, "out", plan, provenance)
    return plan


# Model folders


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
    return _model_kind(
        {"tokenizer.json": mutations.mutate_json},
        [(use_tokenizer, 1), (plan_union, 4)],
        _tokenizer_words(),
    )


def tokenizer_config() -> Kind:
    """tokenizer_config.json and special_tokens_map.json of a model."""
    return _model_kind(
        {name: mutations.mutate_json for name in _TOKENIZER_SETTINGS},
        [(use_tokenizer, 1), (plan_union, 2), (use_full_tokenizer, 20)],
        _tokenizer_words(),
    )


def chat_template() -> Kind:
    """Chat template of a model."""
    return _model_kind(
        {"chat_template.jinja": mutations.mutate_text},
        [(render_chat, 1)],
        ("{{", "}}", "{% for m in messages %}", "{% endfor %}", "range(9999)", "loop", "|join")
        + (
            "messages",
            "namespace(a=0)",
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "cycler",
        )
        + ("lipsum(9999)", "'x' * 9**9", "9**9**9", "m.__class__", "{% include 'x' %}", "tojson"),
    )


def safetensors() -> Kind:
    """Weights of a model."""
    return _model_kind(
        {"model.safetensors": mutations.mutate_safetensors},
        [(read_tensors, 1), (open_model, 1), (plan_merge, 4), (merge_folder, 200)],
        inputs.words("io/safetensors_writer.py", "models/params.py") + ("BF16", "F64", "I64", "F8"),
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
    from sdjax.io.safetensors_reader import SafetensorsReader

    reader = SafetensorsReader(folder)
    reader.infos(reader.names)
    for name in reader.names:
        reader.read(name)


def plan_merge(folder: Path) -> None:
    _plan(_recipe_of(folder, str(folder), "chat_template: auto\n"))


def plan_union(folder: Path) -> None:
    more = "tokenizer_source: union\nchat_template: auto\n"
    _plan(_recipe_of(folder, "base", more), allow_crimes=True)


def merge_folder(folder: Path) -> None:
    from sdjax.merging.recipe.pipeline import merge_recipe

    path = _recipe_of(folder, str(folder), "tokenizer_source: union\n")
    merge_recipe(path, folder.parent / "out")


def _recipe_of(folder: Path, other: str, more: str) -> Path:
    path = folder.parent / "recipe" / "recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    text = RECIPE.replace("MODEL", str(folder)).replace("OTHER", other)
    path.write_text(text + more)
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
        },
        loaders=[(use_adapter, 1), (read_adapted, 1)],
        words=inputs.words("io/peft.py", "models/lora.py") + ("(a+)+$", ".*", "(", "q_proj|v_proj"),
        shared=_shared(),
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


# Data


def jsonl() -> Kind:
    """Data of tasks and of training, and results of evaluations."""
    files = {name: inputs.jsonl(rows) for name, rows in inputs.data_rows()}
    return Kind(
        folders=[{name: content} for name, content in files.items()],
        formats={name: mutations.mutate_jsonl for name in files},
        loaders=[(read_data, 1)],
        words=inputs.words("evaluation/tasks", "training/data.py", "evaluation/results.py"),
        shared=_shared(),
    )


def read_data(folder: Path) -> None:
    from sdjax.evaluation.comparison import compare
    from sdjax.evaluation.prompts import build_prompts
    from sdjax.evaluation.task import grade_output, read_problems
    from sdjax.evaluation.tasks.registry import find_task
    from sdjax.training.data import fingerprint, read_rows, tokenize_examples, tokenize_pairs

    path = next(folder.iterdir(), folder / "sft.jsonl")
    if path.stem in ("sft", "dpo"):
        rows = read_rows(str(path), "train")
        fingerprint(rows)
        tokenize = tokenize_examples if path.stem == "sft" else tokenize_pairs
        tokenize(rows, _tokenizer(), 64)
    elif path.stem == "results":
        compare(path, path)
    else:
        name = str(path) if path.stem == "questions" else path.stem
        data = None if path.stem == "questions" else path
        task = find_task(name, data=data, allow_missing=())
        for split in ("development", "test"):
            problems = read_problems(task, split)
            build_prompts(task, problems, _tokenizer())
            if path.stem != "math":  # whose grader is a process of its own
                for problem in problems:
                    grade_output(task, problem, problem.solution or problem.answer)


def results() -> Kind:
    """Results folder of an evaluation."""
    settings = {"model": "m", "weights": "w", "task": "t", "max_new_tokens": 8, "dtype": "float32"}
    stored = settings | {"versions": {"jax": "0.10.2"}, "accepted": []}
    rows = dict(inputs.data_rows())["results.jsonl"]
    return Kind(
        folders=[
            {
                "settings.json": inputs.json.dumps(stored).encode(),
                "results.jsonl": inputs.jsonl(rows),
            }
        ],
        formats={"settings.json": mutations.mutate_json, "results.jsonl": mutations.mutate_jsonl},
        loaders=[(functools.partial(resume_results, settings), 1)],
        words=inputs.words("evaluation/results.py"),
        writes=True,
    )


def resume_results(settings: Mapping[str, Any], folder: Path) -> None:
    from sdjax.evaluation.prompts import PromptedProblem
    from sdjax.evaluation.results import ResultsFolder
    from sdjax.evaluation.task import Problem

    problems = [
        PromptedProblem(
            problem=Problem(id=f"test-{n}", kind="k", question="a", answer="1"), text="", tokens=()
        )
        for n in range(3)
    ]
    with ResultsFolder(folder, settings, versions={"jax": "0.12"}, accept_versions=True) as opened:
        opened.missing(problems)
        opened.finish([])


def prompt() -> Kind:
    """Prompt of a generator."""
    texts = [path.read_bytes() for path in (inputs.PACKAGE / "programs/prompts").glob("*.txt")]
    return Kind(
        folders=[{"prompt.txt": text} for text in texts],
        formats={"prompt.txt": mutations.mutate_text},
        loaders=[(render_prompt, 1)],
        words=("$experts", "${names}", "$$", "$x", "${", "$count$names", "$é"),
    )


def render_prompt(folder: Path) -> None:
    from sdjax.programs.prompts import find_prompt

    found = find_prompt(str(folder / "prompt.txt"))
    found.render(slots=("expert_1",), descriptions={"expert_1": "x"})


# Programs and runs


def program() -> Kind:
    """Source text of a program, checked by the text rules."""
    texts = [path.read_bytes() for path in (inputs.PACKAGE / "merging/methods").glob("[a-z]*.py")]
    return Kind(
        folders=[{"program.py": text} for text in texts],
        formats={"program.py": mutations.mutate_text},
        loaders=[(check_program, 1)],
        words=inputs.words("sandbox/worker/rules.py")
        + ("lambda", "eval", "def merge_models(x):", "import os", 'f"{x}"', "match x:", "\\"),
    )


def check_program(folder: Path) -> None:
    from sdjax.cli.open_algorithm import read_program
    from sdjax.sandbox.refusal import Refusal
    from sdjax.sandbox.worker.rules import check_text

    try:
        check_text(read_program(folder / "program.py", 16_384), 16_384)
    except Refusal as refusal:
        assert len(refusal.message.splitlines()) <= 1, refusal.message


def run() -> Kind:
    """Run folder."""
    return Kind(
        folders=[inputs.run()],
        formats={"run.sqlite": mutations.mutate_sqlite},
        loaders=[
            (read_run, 1),
            (tabulate_run, 1),
            (extend_run, 4),
            (report_run, 20),
            (plan_stored_run, 100),
        ],
        words=inputs.words("search/types.py", "search/config.py", "search/ranking.py"),
        writes=True,
    )


def read_run(folder: Path) -> None:
    from sdjax.cli.sandbox_options import signature_from_options
    from sdjax.search.context import verify_stored
    from sdjax.search.pairs import preferences_of_run
    from sdjax.search.ranking import ranked_programs
    from sdjax.search.store import Store

    preferences_of_run(folder)
    with Store.open(folder) as store:
        config = store.config()
        programs = ranked_programs(store, config.task.metric)
        program = store.program(programs[0].identity or "") if programs else None
    signature = signature_from_options(model=None, experts=None, scope=None, run=folder)
    if program is not None:
        verify_stored(program, signature)


def tabulate_run(folder: Path) -> None:
    from rich.console import Console

    from sdjax.report import final_table
    from sdjax.search.store import Store
    from sdjax.search.types import Setting

    console = Console(file=io.StringIO(), width=80)
    with Store.open(folder) as store:
        for setting in store.select(Setting):
            console.print(final_table(store, setting.name, width=80))


def report_run(folder: Path) -> None:
    from sdjax.report import write_report
    from sdjax.search.store import Store

    with Store.open(folder) as store:
        write_report(store, folder / "report.html")


def plan_stored_run(folder: Path) -> None:
    from sdjax.search.announcement import dry_run
    from sdjax.search.multihost import stored_config

    dry_run(stored_config(folder), folder, resume=True, accept_versions=True)


def extend_run(folder: Path) -> None:
    from sdjax.search.multihost import stored_config
    from sdjax.search.resume import resume_store
    from sdjax.search.store import Store

    config = stored_config(folder, ["iterations=5"])
    with Store.open(folder, write=True) as store:
        resume_store(store, config, {}, accept_versions=True)


def checkpoint() -> Kind:
    """Checkpoints of a run's generator."""
    files = inputs.checkpoint()
    formats = {
        name: mutations.mutate_json if content.lstrip()[:1] == b"{" else mutations.mutate_bytes
        for name, content in files.items()
    }
    return Kind(folders=[files], formats=formats, loaders=[(restore, 1)], writes=True)


def restore(folder: Path) -> None:
    from sdjax.io.orbax import GeneratorCheckpoints

    checkpoints = GeneratorCheckpoints(folder)
    try:
        checkpoints.restore_adapter()
    finally:
        checkpoints.close()


KINDS: dict[str, Callable[[], Kind]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(run_config, train_config, recipe, config_json, generation_config, tokenizer_json),
        *(tokenizer_config, chat_template, safetensors, index, adapter, training_programs),
        *(jsonl, results, prompt, program, run, checkpoint),
    )
}
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def _configs(choose: Callable[[str], bool]) -> list[bytes]:
    paths = sorted((inputs.PACKAGE / "configs").glob("*.yaml"))
    return [path.read_bytes() for path in paths if choose(path.stem)]


def _model_kind(
    formats: Mapping[str, Mutate], loaders: Sequence[tuple[Load, int]], words: Sequence[str]
) -> Kind:
    return Kind(
        folders=inputs.models(), formats=formats, loaders=loaders, words=words, shared=_shared()
    )


def _shared() -> Folder:
    return {f"base/{name}": content for name, content in inputs.models()[0].items()}


def _tokenizer_words() -> tuple[str, ...]:
    return inputs.words("io/tokenizer.py", "io/model_files.py") + (
        *("BPE", "WordPiece", "Unigram", "WordLevel", "ByteLevel", "Metaspace", "Sequence", "NFC"),
        *(
            "Split",
            "Replace",
            "Strip",
            "Prepend",
            "Precompiled",
            "Lowercase",
            "Regex",
            "ByteFallback",
        ),
        *("BertProcessing", "TemplateProcessing", "CTC", "Fuse", "LlamaTokenizer", "BertTokenizer"),
        *(
            "ignore_merges",
            "fuse_unk",
            "dropout",
            "byte_fallback",
            "truncation",
            "padding",
            "(a|a)*$",
        ),
    )


@functools.cache
def _tokenizer() -> Any:
    from sdjax.io.tokenizer import load_tokenizer

    return load_tokenizer(Path("base").resolve())
