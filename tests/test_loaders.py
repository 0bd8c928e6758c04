"""Files from others are read by one bounded reader, and the threat model lists every loader."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Calls that read a file or parse text without the limits of `sdjax.core.files` and
# `sdjax.core.json`; each file may have only those listed here.
_UNBOUNDED = {
    # The readers themselves.
    "core/json.py": {"json.JSONDecoder"},
    "core/files.py": {"os.open", "os.fdopen"},
    "core/yaml.py": {"yaml.compose"},
    "io/jsonl.py": {"gzip.GzipFile"},
    # Limits of their own, and libraries that read names of files, checked by `member`.
    "io/training_programs.py": {"gzip.GzipFile", "np.lib.format.read_array"},
    "io/torch_file.py": {"zipfile.ZipFile"},
    "io/tokenizer.py": {"AutoTokenizer.from_pretrained"},
    "io/tokenizer_limits.py": {"json.loads"},
    "io/hub.py": {"datasets.load_dataset"},
    "training/checkpoints.py": {"np.load", "zipfile.ZipFile", "self._path.open", "json.loads"},
    # Written, not read.
    "io/links.py": {"os.open"},
    "io/atomic_write.py": {"os.open", "os.fdopen"},
    "io/resumable_writer.py": {"(self.folder / JOURNAL).open", "os.open", "_BOOT_ID.read_text"},
    "io/resumable_log.py": {"self.path.open"},
    "generators/recording.py": {"self.path.open"},
    "cli/generate.py": {"os.fdopen"},
    # Files of the package and of the system.
    "evaluation/tasks/fixed.py": {"(_FOLDER / f'{name}.jsonl').read_text", "json.loads"},
    "report/page.py": {"TEMPLATE.read_text"},
    "core/host_memory.py": {"(base / folder / name).read_text", "membership.read_text"},
    "isolation/confine.py": {"json.loads", "open"},
    "isolation/landlock.py": {"os.open"},
    "isolation/server.py": {"json.loads"},
    # The database, whose values are parsed by core/json.py.
    "search/attempts.py": {"sqlite3.connect"},
    "search/database.py": {"sqlite3.connect"},
    "search/schema_check.py": {"sqlite3.connect"},
    # Messages between processes of one command, verified by their receivers.
    "io/chat_worker.py": {"json.loads", "os.fdopen"},
    "evaluation/answer_worker.py": {"json.loads"},
    "evaluation/evaluator.py": {"json.loads"},
    "evaluation/grader.py": {"json.loads"},
    "sandbox/compiler/entry.py": {"json.loads"},
    "sandbox/ir/decode.py": {"json.loads"},
    "sandbox/ir/hashes.py": {"json.loads"},
    "sandbox/merge_trial.py": {"json.loads"},
    "sandbox/replies.py": {"json.loads"},
    "sandbox/signature.py": {"json.loads"},
    "report/transfer.py": {"json.loads"},
    "generators/shared.py": {"json.loads"},
    "search/extension.py": {"json.loads"},
    "search/generator_plan.py": {"json.loads"},
    "search/multihost.py": {"json.loads"},
    "search/transfer.py": {"json.loads"},
    "sharding/multihost.py": {"json.loads"},
    "tuning/programs.py": {"json.loads"},
    "tuning/trace.py": {"json.loads"},
}
_METHODS = {"read_text", "read_bytes", "from_file", "from_pretrained", "load_dataset", "read_array"}
_OWNERS = {
    "json",
    "yaml",
    "gzip",
    "zipfile",
    "zlib",
    "bz2",
    "lzma",
    "tarfile",
    "sqlite3",
    "tomllib",
}
_READERS = {"load", "loads", "compose", "safe_load", "open", "GzipFile", "ZipFile", "connect"}
_READERS |= {"decompress", "JSONDecoder", "parse"}
_PLAIN = {"open", "safe_open"}


def _unbounded_calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, function = ast.unparse(node.func), node.func
        if isinstance(function, ast.Name) and function.id in _PLAIN:
            yield name
        if isinstance(function, ast.Attribute):
            owner, attribute = ast.unparse(function.value), function.attr
            is_library = owner in _OWNERS and attribute in _READERS
            is_numpy = owner == "np" and attribute == "load"
            has_mode = bool(node.args) and isinstance(node.args[0], ast.Constant)
            is_open = (attribute == "open" and (has_mode or owner == "os")) or attribute == "fdopen"
            if attribute in _METHODS or is_library or is_numpy or is_open:
                yield name


def test_files_are_read_by_the_bounded_readers():
    found = {}
    for path in sorted((ROOT / "sdjax").rglob("*.py")):
        if calls := set(_unbounded_calls(path)):
            found[path.relative_to(ROOT / "sdjax").as_posix()] = calls
    unexpected = {name: calls - _UNBOUNDED.get(name, set()) for name, calls in found.items()}
    assert not {name: calls for name, calls in unexpected.items() if calls}
    unused = {name: calls - found.get(name, set()) for name, calls in _UNBOUNDED.items()}
    assert not {name: calls for name, calls in unused.items() if calls}


def test_the_threat_model_lists_readers_and_tests_that_exist():
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    table = text.partition("## Limits of every reader")[2].partition("\n--8<--")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for _, functions, limits, test in rows:
        assert limits
        for name in re.findall(r"`(sdjax\.[\w.]+)`", functions):
            module, _, function = name.rpartition(".")
            source = (ROOT / module.replace(".", "/")).with_suffix(".py")
            assert re.search(rf"^(def|class) {function}\b", source.read_text("utf-8"), re.M), name
        (path,) = re.findall(r"`(tests/[\w/.]+)`", test)
        assert (ROOT / path).is_file(), path
