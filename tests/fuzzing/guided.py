"""Coverage-guided fuzzing of one kind of files, with atheris (Python 3.11)."""

import contextlib
import random
import sys
from pathlib import Path

from tests.fuzzing import inputs
from tests.fuzzing.run import SECONDS, Fault, Fuzzer


def fuzz_guided(name: str, folder: Path, flags: list[str]) -> None:
    """Run libFuzzer on the first file of a kind; it ends the process.

    Args:
        name: the kind.
        folder: the corpus, to which inputs that reach new code are added.
        flags: libFuzzer's own flags, such as -runs=100000.
    """
    import atheris

    with contextlib.ExitStack() as stack:
        with atheris.instrument_imports(include=["sdjax"]):
            fuzzer = stack.enter_context(Fuzzer(name))
            fuzzer.check_valid()  # imports what the loaders need
        file, mutate = next(iter(fuzzer.kind.formats.items()))
        corpus, files = fuzzer.corpus(file), fuzzer.kind.folders[0]
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(corpus.contents):
            (folder / f"valid-{number}").write_bytes(content)
        count = 0

        def one_input(content: bytes) -> None:
            nonlocal count
            count += 1
            with fuzzer.folder() as written:
                inputs.write(written, {**files, file: content})
                outcome = fuzzer.judge(written, count)
            if outcome.fault is not None:
                raise Fault(outcome.fault)

        def custom(content: bytes, max_size: int, seed: int) -> bytes:
            draw = random.Random(seed)
            # Content that the fuzzer has damaged may not have its format.
            with contextlib.suppress(Exception):
                if draw.random() < 0.8:
                    return mutate(content, corpus, draw)[:max_size]
            return atheris.Mutate(content, len(content))

        arguments = [sys.argv[0], str(folder), f"-timeout={10 * SECONDS}", "-max_len=300000"]
        atheris.Setup([*arguments, *flags], one_input, custom_mutator=custom)
        atheris.Fuzz()
