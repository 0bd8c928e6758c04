"""Mutation of JSON-like trees, and their text, which may be no valid JSON.

A tree consists of dicts, lists, strings, numbers, booleans and None, and of two more nodes that
only the text has: `Raw` text, and `Pairs`, a mapping that may have a key twice.
"""

import json
import random
from collections.abc import Sequence
from typing import Any

Path = tuple[int | str, ...]


class Raw(str):
    """Text that stands for a value as it is, such as `NaN` or a number of 5,000 digits."""


class Pairs(list[tuple[str, Any]]):
    """The items of a mapping, in which a key may occur twice."""


# Values that loaders have to refuse in most places.
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 65_536, 2**31 - 1, 2**31, 2**53, 2**63, 10**30),
    *(-(2**31), -(2**63) - 1, 0.5, -0.5, -0.0, 1e-320, 1e308, -1e308, 1e18),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-0", "01", "1_0", "0x10", "9" * 5_000)),
    *map(Raw, ("12:30", "-1:30.5", "!!int 1:1", f"!!float 1{':1' * 50_000}", f"1{':1' * 50_000}")),
    *map(Raw, (r'"\ud800"', r'"\u0000"', "[" * 100_000, '{"a":' * 5_000, '"\x01"', "", "'")),
    *("", " ", "0", "1", "nan", "true", "null", "a\nb", "\x00", "\x1b[31m\x07", "\u202e\u2028"),
    *("ｆ", "\ud83d", "../../x", "/etc/passwd", "~", ".", "..", "/dev/zero", "x" * 300, "(a+)+$"),
    *("{{ 7 * 7 }}", "{% for i in range(9**9) %}", "%s%n", "${x}", "__class__", "os:system", "a b"),
    *("zoo:seed", "zoo:\n", "a+b", "+", "http://127.0.0.1:9", "x" * 100_000),
    *([], {}, [0], [[]], [None], [""], [1, 2, 3], [{}], {"": 0}, {"a": None}, {"a": {"b": []}}),
    *([0] * 1_000, [1e308, 1e308], [True, "x"], {"content": "x"}, {"content": 1}, {"0": "x"}),
)
MAX_TEXT = 200_000  # characters; the tokenizers library needs a second per million
NUMBERS = (0, 1, -1, 2, 4, 1000, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**18)


def to_text(node: Any) -> str:
    """Return the JSON text of a tree."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, dict | Pairs):
        items = node.items() if isinstance(node, dict) else node
        return "{" + ", ".join(f"{_quoted(key)}: {to_text(value)}" for key, value in items) + "}"
    if isinstance(node, list | tuple):
        return f"[{', '.join(map(to_text, node))}]"
    return _quoted(node) if isinstance(node, str) else json.dumps(node)


def _quoted(text: str) -> str:
    return str(text) if isinstance(text, Raw) else json.dumps(text, ensure_ascii=False)


def random_path(tree: Any, draw: random.Random, stop: float = 0.05) -> Path:
    """Return the path of a random node; a level is entered with probability 1 - `stop`."""
    path: list[Any] = []
    while isinstance(tree, dict | list) and tree and draw.random() >= stop:
        key = draw.choice(list(tree)) if isinstance(tree, dict) else draw.randrange(len(tree))
        if isinstance(tree, Pairs):
            break
        path.append(key)
        tree = tree[key]
    return tuple(path)


def node_at(tree: Any, path: Path) -> Any:
    """Return the node at a path."""
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree: Any, path: Path, node: Any) -> Any:
    """Return the tree with another node at a path."""
    if not path:
        return node
    key, inner = path[0], replaced(tree[path[0]], path[1:], node)
    return tree | {key: inner} if isinstance(tree, dict) else [*tree[:key], inner, *tree[key + 1 :]]


def mutated(tree: Any, others: Sequence[Any], words: Sequence[str], draw: random.Random) -> Any:
    """Return the tree with one node changed.

    Args:
        tree: a tree.
        others: trees of the same kind, whose nodes may replace one of this tree.
        words: keys and strings that mean something to the loaders of this kind.
        draw: the random generator.
    """
    path = random_path(tree, draw)
    return replaced(tree, path, _changed(node_at(tree, path), others, words, draw))


def _changed(node: Any, others: Sequence[Any], words: Sequence[str], draw: random.Random) -> Any:
    action = draw.random()
    if action < 0.2:
        return draw.choice(JUNK)
    if action < 0.3:
        other = draw.choice(others)
        return node_at(other, random_path(other, draw))
    if action < 0.4:
        return _as_another_type(node, draw)
    match node:
        case bool():
            return not node
        case int() | float():
            return _number(node, draw)
        case str():
            return _string(node, words, draw)
        case dict() if node:
            return _mapping(node, others, words, draw)
        case list() if node:
            return _list(node, draw)
    return draw.choice(JUNK)


def _as_another_type(node: Any, draw: random.Random) -> Any:
    wrapped = ([node], {"a": node}, {"content": node}, str(node)[:1_000], None, [node, node])
    if isinstance(node, dict):
        return draw.choice((*wrapped, list(node), list(node.values()), len(node)))
    if isinstance(node, list):
        named = {str(index): item for index, item in enumerate(node)}
        return draw.choice((*wrapped, named, node[0] if node else None, len(node)))
    if isinstance(node, int | float):
        return draw.choice((*wrapped, bool(node), -node))
    return draw.choice(wrapped)


def _number(node: float, draw: random.Random) -> float:
    near = (node + 1, node - 1, -node, 2 * node, node * 1_000, node + 0.5, draw.randrange(100))
    return draw.choice((*near, *NUMBERS))


def _string(node: str, words: Sequence[str], draw: random.Random) -> str:
    action, at = draw.randrange(7), draw.randrange(len(node) + 1)
    if action < 2 and words:
        return draw.choice(words)
    if action == 2:
        return (
            node[:at] + draw.choice(("\n", "\x00", "\u202e", " ", "/", ":", "é", "$")) + node[at:]
        )
    if action == 3:
        return node[:at] + node[at + 1 :]
    if action == 4:
        return node[:at]
    if action == 5:
        return (node * draw.choice((2, 10, 1_000)))[:MAX_TEXT]
    return draw.choice((node.upper(), node.swapcase(), f" {node} ", node[::-1]))


def _mapping(
    node: dict[str, Any], others: Sequence[Any], words: Sequence[str], draw: random.Random
) -> Any:
    key, action = draw.choice(list(node)), draw.randrange(6)
    other = draw.choice(words) if words and draw.random() < 0.8 else _string(str(key), words, draw)
    if action == 0:
        return {name: value for name, value in node.items() if name != key}
    if action == 1:
        return {other if name == key else name: value for name, value in node.items()}
    if action == 2:
        return Pairs([*node.items(), (key, draw.choice((node[key], *JUNK)))])
    if action == 3:
        second = draw.choice(list(node))
        return node | {key: node[second], second: node[key]}
    donor = draw.choice(others)
    value = node_at(donor, random_path(donor, draw, stop=0)) if action == 4 else draw.choice(JUNK)
    return node | {other: value}


def _list(node: list[Any], draw: random.Random) -> Any:
    at, item = draw.randrange(len(node)), draw.choice(node)
    return draw.choice(
        (
            node[:at] + node[at + 1 :],
            [*node[:at], item, *node[at:]],
            [*node[:at], item, *node[at + 1 :]],
            draw.sample(node, len(node)),
            [*node, *node],
            [*node, draw.choice(JUNK)],
            [node],
            [],
        )
    )
