"""Fuzzing of one kind of files in this process: mutate, load, judge.

Input N of a kind under a random seed is always the same, so a fault is reproduced by its number.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.fuzzing import inputs, targets
from tests.fuzzing.kinds import Kind, Load
from tests.fuzzing.mutations import (
    Corpus,
    mutate_json,
    mutate_jsonl,
    mutate_jsonl_gzip,
    mutate_links,
    mutate_safetensors,
    mutate_yaml,
)

SECONDS = 10  # limit on processor time per input
WAITING_SECONDS = 120  # limit on time per input, for loaders that wait; the machine may be loaded
MEMORY = 2**31  # bytes that an input may take
MAX_LINE = 2_100  # characters of an error message, with "sdjax: "
LINKS = 0.02  # fraction of the inputs in which a file is a link or something else
_RESULTS = ("out", "merged")  # what loaders may write next to the input
SECRET = b"SECRET-7f3a"


class Hang(BaseException):
    """Raised when an input takes longer than SECONDS. Not an Exception, so never caught."""


class Fault(Exception):
    """What no input may cause, other than an exception."""


@dataclasses.dataclass
class Outcome:
    """Result of one input.

    Attributes:
        seconds: processor time.
        refused: messages of the loaders that refused it.
        accepted: number of loaders that accepted it.
        fault: a traceback, or what else is wrong; None if nothing is.
        key: what faults of one mechanism have in common.
    """

    seconds: float = 0.0
    refused: list[str] = dataclasses.field(default_factory=list)
    accepted: int = 0
    fault: str | None = None
    key: str = ""


class Fuzzer:
    """The inputs of one kind, and the judge of what their loaders do."""

    def __init__(self, name: str, *, seed: int = 0, kind: Kind | None = None) -> None:
        """Create the valid files. A `kind` of the caller's need not be in `KINDS`."""
        self.name, self.seed = name, seed
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_memory_folder()))
        self._cwd = self._root / "cwd"
        self._outside = self._root / "outside"
        self.kind = kind or targets.KINDS[name]()
        self._corpora = {file: _corpus(self.kind, file) for file in self.kind.formats}
        inputs.write(self._cwd, self.kind.shared)
        inputs.write(self._outside, {"secret.txt": SECRET, "model/x": SECRET, "x.jsonl": b""})
        self._before = _listing(self._cwd)
        self._number = 0

    def __enter__(self) -> "Fuzzer":
        self._old_cwd = Path.cwd()
        os.chdir(self._cwd)
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self._old_cwd)
        shutil.rmtree(self._root, ignore_errors=True)

    def write_input(self, number: int, folder: Path) -> None:
        """Write the folder of an input; the next one is written by the same number plus one."""
        draw = random.Random(f"{self.name}/{self.seed}/{number}")
        files = dict(draw.choice(self.kind.folders))
        mutable = [name for name in self.kind.formats if name in files]
        chosen = draw.sample(mutable, 1 if draw.random() < 0.9 else len(mutable))
        linked = draw.random() < LINKS
        for name in chosen:
            if not linked:
                corpus = self.corpus(name)
                files[name] = self.kind.formats[name](files[name], corpus, draw)
        inputs.write(folder, files)
        if linked:
            mutate_links(folder, chosen[0], self._outside, draw)

    def check_valid(self) -> None:
        """Raise Fault unless all loaders accept all valid folders."""
        for files in self.kind.folders:
            with self.folder() as folder:
                inputs.write(folder, files)
                outcome = self.judge(folder, 0)
            if outcome.fault is not None or outcome.refused:
                problem = outcome.fault or outcome.refused[0]
                raise Fault(f"{self.name}: a valid folder is refused: {problem}")

    def run(self, number: int, *, keep: Path | None = None) -> Outcome:
        """Write and judge an input; keep its folder if there is a fault."""
        with self.folder() as folder:
            self.write_input(number, folder)
            outcome = self.judge(folder, number)
        if outcome.fault is not None and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            self.write_input(number, keep / "in")
            (keep / "fault.txt").write_text(outcome.fault, errors="surrogateescape")
        return outcome

    def judge(self, folder: Path, number: int) -> Outcome:
        """Have the loaders read a folder."""
        outcome = Outcome()
        outside, own = _listing(self._outside), _listing(folder)
        started = time.process_time()
        for load, every in self.kind.loaders:
            if number % every == 0:
                self._load(load, folder, outcome)
                if outcome.fault is not None:
                    break
        outcome.seconds = time.process_time() - started
        if outcome.fault is None:
            self._check_files(folder, own, outside, outcome)
        return outcome

    def _load(self, load: Load, folder: Path, outcome: Outcome) -> None:
        from sdjax.cli.group import exit_status
        from sdjax.core.visible import escape

        name = getattr(load, "__name__", "load")
        try:
            with _time_limit():
                load(folder)
            outcome.accepted += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            status, message = exit_status(error)
            message = escape(message)
            if status == 2 and len(message.splitlines()) == 1 and len(message) <= MAX_LINE:
                outcome.refused.append(message)
                return
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "/sdjax/" in f.filename] or frames
            kind = type(error).__name__ if status != 2 else f"{type(error).__name__}, not one line"
            outcome.key = f"{kind} at {own[-1].filename.split('/sdjax/')[-1]}:{own[-1].name}"
            text = "".join(traceback.format_exception(error))
            outcome.fault = f"{name}: {outcome.key}\n{message[:MAX_LINE]}\n{text[-8_000:]}"

    def _check_files(self, folder: Path, own: dict, outside: dict, outcome: Outcome) -> None:
        changed = {
            "the folder outside": _listing(self._outside) != outside,
            "the working directory": _listing(self._cwd) != self._before,
            "the input": not self.kind.writes and _listing(folder) != own,
        }
        names = {path.name for path in folder.parent.iterdir()} - {"in", *_RESULTS, "recipe"}
        changed["the parent folder"] = any(not name.startswith(".merged") for name in names)
        for what, is_changed in changed.items():
            if is_changed:
                outcome.key = outcome.fault = f"{what} was changed {sorted(names)}"
        for path in (path for name in _RESULTS for path in folder.parent.glob(f"{name}/**/*")):
            if path.is_symlink() or (path.is_file() and SECRET in path.read_bytes()):
                outcome.key = outcome.fault = f"the result has a file from outside: {path.name}"

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a folder for one input, removed afterwards."""
        self._number += 1
        parent = self._root / f"input-{self._number}"
        (parent / "in").mkdir(parents=True)
        try:
            yield parent / "in"
        finally:
            shutil.rmtree(parent, ignore_errors=True)

    def corpus(self, file: str) -> Corpus:
        """Return what the mutations of a file draw from."""
        return self._corpora[file]


def fuzz(
    name: str, numbers: range, *, seed: int = 0, keep: Path | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Yield the number and the outcome of each input."""
    with Fuzzer(name, seed=seed) as fuzzer:
        fuzzer.check_valid()
        for number in numbers:
            folder = None if keep is None else keep / f"{name}-{seed}-{number}"
            yield number, fuzzer.run(number, keep=folder)


def limit_resources() -> None:
    """Limit the memory and the size of files that inputs may take in this process."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise Hang in the block after SECONDS of processor time, or WAITING_SECONDS of time.

    Code in C that never returns is ended by `supervise`, with the process.
    """

    def hang(number: int, frame: Any) -> None:
        raise Hang

    before = [(name, signal.signal(name, hang)) for name in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in before:
            signal.signal(name, handler)


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return mode, size and modification time of everything in a folder."""
    found = {}
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                stat = entry.stat(follow_symlinks=False)
                found[entry.path] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return found


def _corpus(kind: Kind, name: str) -> Corpus:
    contents = [files[name] for files in (*kind.folders, *kind.donors) if name in files]
    match kind.formats[name]:
        case mutate if mutate is mutate_json:
            trees = [json.loads(content) for content in contents]
        case mutate if mutate is mutate_yaml:
            trees = [yaml.safe_load(content) for content in contents]
        case mutate if mutate in (mutate_jsonl, mutate_jsonl_gzip):
            if mutate is mutate_jsonl_gzip:
                contents = [gzip.decompress(content) for content in contents]
            lines = [line for content in contents for line in content.split(b"\n") if line]
            trees = [json.loads(line) for line in lines]
        case mutate if mutate is mutate_safetensors:
            trees = [json.loads(c[8 : 8 + int.from_bytes(c[:8], "little")]) for c in contents]
        case _:
            trees = [None]
    return Corpus(contents=contents, trees=trees, words=kind.words)


def _memory_folder() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None
