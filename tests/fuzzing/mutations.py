"""Mutation of files by format: bytes, text, JSON, YAML, JSONL, safetensors, SQLite, gzip and links.

Each format is a function from (content, corpus, draw) to the new content. Most mutations keep the
format valid, so that they reach the code behind the parser; some damage it.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.fuzzing.torch_files import archive
from tests.fuzzing.trees import JUNK, Raw, mutated, to_text

MANY = 100_000  # repetitions in files that are large or deeply nested
_NESTS = (
    "\n",
    " \n",
    ":1",
    "[",
    "{",
    '{"a":',
    "(",
    "- ",
    "  ",
    "[0,",
    "<<: [",
    "&a [*a,",
    "{{",
    "{% if a %}",
)
# Parts of a pickle: names of functions, operations that build objects, sizes.
_PICKLED = (
    *(
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "cos\nsystem\n",
        "c__builtin__\neval\n",
        "tR",
        "tQ",
        ")R",
    ),
    *(
        "ctorch\nFloatStorage\n",
        "ctorch\nLongStorage\n",
        "ccollections\nOrderedDict\n",
        "}",
        "]",
        "(",
    ),
    *(
        "J\x08\0\0\0",
        "J\0\0\0\x7f",
        "h\0",
        "q\0",
        "\x81",
        "b",
        "s",
        "u.",
        "o",
        "i",
        "N",
        "K\0",
        ".",
        "\x93",  # a name from the stack
        ")" + "\x85" * 5_000,  # a deep tuple, and one whose repr is longer than any memory
        "K\1q\0" + "".join("(" + f"h{chr(i)}" * 10 + f"tq{chr(i + 1)}" for i in range(12)),
    ),
)
_BYTES = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\x1b[2J", b"\xed\xa0\x80", b"\x80", b"\t")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """What mutations of one kind of file draw from.

    Attributes:
        contents: contents of valid files.
        trees: the trees of those that are JSON or YAML.
        words: keys and strings that the loaders know.
    """

    contents: Sequence[bytes]
    trees: Sequence[Any] = (None,)
    words: Sequence[str] = ()


Mutate = Callable[[bytes, Corpus, random.Random], bytes]


def mutate_bytes(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Flip, insert, delete, repeat or replace bytes; truncate or extend the content."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, size = draw.randrange(len(content) + 1), draw.choice((1, 1, 4, 64, 4_096))
        part, action = content[at : at + size], draw.randrange(8)
        if action == 0 and part:
            content = content[:at] + bytes([part[0] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif action == 1:
            content = content[:at] + draw.choice(_BYTES) + content[at:]
        elif action == 2:
            content = content[:at] + content[at + size :]
        elif action == 3:
            content = content[:at] + part * draw.choice((2, 10)) + content[at:]
        elif action == 4:
            content = content[:at]
        elif action == 5:
            content = content[:at] + draw.randbytes(size) + content[at + size :]
        elif action == 6:
            other = draw.choice(corpus.contents)
            start = draw.randrange(len(other) + 1)
            content = content[:at] + other[start : start + 64 * size] + content[at:]
        else:
            content = content + bytes(draw.choice((1, 8, 100_000)))
    return content


def mutate_text(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change lines and words, the encoding or the nesting of a text."""
    text, action = content.decode("utf-8", "replace"), draw.randrange(12)
    lines = text.split("\n")
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    if action == 0:
        lines.insert(other, lines[at])
    elif action == 1:
        del lines[at]
    elif action == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif action == 3:
        lines[at] = draw.choice(("  ", "\t", " ")) + lines[at]
    elif action == 4:
        lines[at] = f"{lines[at]} {draw.choice(corpus.words or ('x',))}"
    elif action == 5:
        junk = draw.choice(JUNK)
        words = lines[at].split(" ")
        words[draw.randrange(len(words))] = to_text(junk) if draw.random() < 0.5 else str(junk)
        lines[at] = " ".join(words)
    elif action == 6:
        lines[at] += draw.choice(_NESTS) * draw.choice((1, 30, 1_000, MANY))
    elif action == 7:
        lines[at] = lines[at].replace(
            draw.choice(lines[at] or " "), draw.choice("[]{}:\"'&*!%@`|>")
        )
    elif action == 8:
        return text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")), "replace")
    elif action == 9:
        lines[at] = lines[at] + draw.choice(
            ("&a", "*a", "!!python/object:os.system", "<<: *a", "---")
        )
    elif action == 10:
        donor = draw.choice(corpus.contents).decode("utf-8", "replace").split("\n")
        lines[at:at] = donor[: draw.randrange(len(donor) + 1)]
    else:
        return mutate_bytes(content, corpus, draw)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_json(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change nodes of a JSON document; one in ten is changed as text instead."""
    if draw.random() < 0.1:
        return mutate_text(content, corpus, draw)
    return _mutated_tree(json.loads(content), corpus, draw)


def mutate_yaml(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change nodes or the text of a YAML document."""
    if draw.random() < 0.3:
        return mutate_text(content, corpus, draw)
    return _mutated_tree(yaml.safe_load(content), corpus, draw)


def mutate_jsonl(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change a line of a JSONL file, or the text."""
    lines = [line for line in content.split(b"\n") if line]
    if draw.random() < 0.1 or not lines:
        return mutate_text(content, corpus, draw)
    at = draw.randrange(len(lines))
    lines[at] = _mutated_tree(json.loads(lines[at]), corpus, draw)
    return b"\n".join([*lines, b""])


def mutate_jsonl_gzip(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change the lines in a compressed file, or the compressed bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(content, corpus, draw)
    return gzip.compress(mutate_jsonl(gzip.decompress(content), corpus, draw), 1, mtime=0)


def mutate_gzip(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change the JSON in a compressed file, or the compressed bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(content, corpus, draw)
    inner = mutate_json(gzip.decompress(content), corpus, draw)
    if draw.random() < 0.02:
        inner += b" " * 2**24
    return gzip.compress(inner, 1, mtime=0)


def mutate_safetensors(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change the header's JSON or its length, or the bytes."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    action = draw.random()
    if action < 0.7:
        header = _mutated_tree(json.loads(header), corpus, draw)
        if draw.random() < 0.5:
            header += b" " * (-len(header) % 8)
    elif action < 0.8:
        header = mutate_text(header, corpus, draw)
    elif action < 0.85:
        wrong = draw.choice((0, 1, size - 1, size + 1, len(content), 10**8, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + header + body
    elif action < 0.95:
        body = mutate_bytes(body, corpus, draw)
    else:
        return mutate_bytes(content, corpus, draw)
    return len(header).to_bytes(8, "little") + header + body


def mutate_torch(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change the pickle in a file of torch.save, its other entries, or the bytes of the file."""
    if draw.random() < 0.2:
        return mutate_bytes(content, corpus, draw)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    action = draw.random()
    if action < 0.6:
        old = draw.choice(_PICKLED).encode("latin-1")
        new = draw.choice((*_PICKLED, *corpus.words)).encode("latin-1", "replace")
        entries[name] = entries[name].replace(old, new, draw.choice((1, -1)))
    if action > 0.4:
        entries[name] = mutate_bytes(entries[name], corpus, draw)
    if action > 0.9:
        return entries[name]
    if draw.random() < 0.1:
        other = draw.choice(list(entries))
        entries[draw.choice((other, "model/x", "../x", "model/constants.pkl"))] = entries.pop(other)
    return archive(entries)


def mutate_gguf(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change names, lengths and types in the header of a GGUF file, or the bytes of the file."""
    if draw.random() < 0.2:
        return mutate_bytes(content, corpus, draw)
    start = content.index(b"token_embd")  # of the tensors
    at = draw.choice((0, start))
    front, header, body = content[:at], content[at : start + 1_500], content[start + 1_500 :]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(header))
        if draw.random() < 0.5:
            size = draw.choice((4, 8))
            number = draw.choice((0, 1, 2, 8, 9, 10, 12, 16, 30, 31, 255, 2**20, 2**31, 2**32 - 1))
            header = header[:at] + number.to_bytes(size, "little") + header[at + size :]
        else:
            word = draw.choice(corpus.words).encode()
            header = header[:at] + len(word).to_bytes(8, "little") + word + header[at:]
    if draw.random() < 0.3:
        header = mutate_bytes(header, corpus, draw)
    return front + header + body


def mutate_sqlite(content: bytes, corpus: Corpus, draw: random.Random) -> bytes:
    """Change cells, rows or the schema of a database, or the bytes of its file."""
    if draw.random() < 0.15:
        return mutate_bytes(content, corpus, draw)
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        path = Path(folder) / "x.sqlite"
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = MEMORY")
            connection.execute("PRAGMA synchronous = OFF")
            # Ends statements on a view that an earlier mutation has created.
            connection.set_progress_handler(lambda: 1, 5_000_000)
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                # Not all statements fit all tables; sqlite3 raises Error, ValueError and others.
                with contextlib.suppress(sqlite3.Error, ValueError, OverflowError):
                    _change_database(connection, corpus, draw)
        return path.read_bytes()


def _change_database(connection: sqlite3.Connection, corpus: Corpus, draw: random.Random) -> None:
    master = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
    names = [name for (name,) in connection.execute(master)]
    table, action = draw.choice(names), draw.random()
    columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
    column = draw.choice(columns or ["rowid"])
    if action < 0.75:
        rows = connection.execute(f'SELECT rowid, "{column}" FROM "{table}"').fetchall()
        if not rows:
            return
        rowid, old = draw.choice(rows)
        new = _cell(old, corpus, draw)
        # A file need not keep to the types that its schema declares.
        if draw.random() < 0.5:
            _retype(connection, table)
        where = f"rowid = {rowid}" if draw.random() < 0.8 else "1"
        connection.execute(f'UPDATE OR IGNORE "{table}" SET "{column}" = ? WHERE {where}', (new,))
        return
    other, junk = draw.choice(names), _cell(None, corpus, draw)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"
    statements = (
        f'DELETE FROM "{table}"',
        f'DROP TABLE "{table}"',
        f'ALTER TABLE "{table}" DROP COLUMN "{column}"',
        f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO x',
        f'ALTER TABLE "{table}" ADD COLUMN extra',
        f'INSERT INTO "{table}" SELECT * FROM "{other}"',
        f'DROP TABLE "{table}"; CREATE VIEW "{table}" AS SELECT * FROM "{other}"',
        f'DROP TABLE "{table}"; CREATE VIEW "{table}" AS {endless}',
        f'CREATE TRIGGER t AFTER INSERT ON "{table}" BEGIN DELETE FROM "{other}"; END',
        f'CREATE INDEX i ON "{table}"("{column}")',
        f'CREATE TABLE "x y" AS SELECT * FROM "{table}"',
        f"PRAGMA user_version = {draw.choice((0, 2, 3, 4, 5, 6, -1, 2**31 - 1))}",
        "PRAGMA encoding = 'UTF-16'; VACUUM",
    )
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.executescript(draw.choice(statements))
    with contextlib.suppress(sqlite3.Error):
        connection.execute(f'INSERT INTO "{table}" ("{column}") VALUES (?)', (junk,))


def _retype(connection: sqlite3.Connection, table: str) -> None:
    """Let a table have values of any type, and null."""
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "UPDATE sqlite_master SET sql = replace(replace(sql, ' STRICT', ''), ' NOT NULL', '') "
        "WHERE name = ?",
        (table,),
    )
    connection.execute("PRAGMA writable_schema = RESET")


def _cell(old: Any, corpus: Corpus, draw: random.Random) -> Any:
    """Return a value for a cell, often JSON like the old one."""
    if isinstance(old, str) and draw.random() < 0.6:
        with contextlib.suppress(ValueError):
            if isinstance(tree := json.loads(old), dict | list):
                return _mutated_tree(tree, corpus, draw).decode("utf-8", "replace")
    plain = [value for value in JUNK if not isinstance(value, list | dict | Raw)]
    texts = ["[]", "{}", "[1]", '{"a": 1}', "[" * 10_000, "NaN", "null", "x\ny", "\x1b[2J"]
    values = [*plain, *texts, b"", b"\xff\x00", b"\x01\x00\x00\x00", bytes(1_000_000), 2**63 - 1]
    if isinstance(old, int | float):
        values += [old + 1, -old, old * 1_000]
    if isinstance(old, str):
        values += [old[:-1], f"{old}x", old.upper(), *corpus.words[:50]]
    return draw.choice(values)


def mutate_links(folder: Path, name: str, outside: Path, draw: random.Random) -> None:
    """Replace a file by a link or by something that is not a file."""
    path, secret = folder / name, outside / "secret.txt"
    content = path.read_bytes()
    path.unlink()
    targets: tuple[Path | str, ...] = (
        *(secret, outside, outside / "missing", path, "/dev/zero", "/dev/null", "/dev/full"),
        *("/proc/self/environ", "../outside/secret.txt", ".", outside / "model"),
    )
    action = draw.randrange(8)
    if action == 0:
        os.mkfifo(path)
    elif action == 1:
        path.mkdir()
    elif action == 2:
        path.write_bytes(content)
        path.chmod(0)
    elif action == 3:
        return  # the file is missing
    elif action == 4:
        (outside / "model" / path.name).write_bytes(content)
        path.symlink_to(outside / "model" / path.name)
    else:
        path.symlink_to(draw.choice(targets))


def _mutated_tree(tree: Any, corpus: Corpus, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        tree = mutated(tree, corpus.trees, corpus.words, draw)
    return to_text(tree).encode("utf-8", "surrogatepass")


_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
