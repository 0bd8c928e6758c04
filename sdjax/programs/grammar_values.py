"""What the family reader knows of a value, and questions about syntax trees.

A `Value` stands for any array a program of one kind could have at that place: the experts it
depends on, its rank, and tags such as "magnitude" or "dot". See `families.py`.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace

ANY = "any"  # an expert met by iterating over the dict


@dataclass(frozen=True, kw_only=True)
class Value:
    """What is known of a value.

    rank: "const" (a Python number), "scalar", "axis" (a row or column), "tensor", "list" (a
    collection of tensors, a stack included), "dict" (task_vectors), or "other".
    """

    rank: str = "other"
    experts: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    items: tuple["Value", ...] = ()
    keys: tuple[str, ...] = ()  # of a dict display, or the keys that a loop over it meets

    def tagged(self, *tags: str) -> "Value":
        return replace(self, tags=self.tags | set(tags))

    def bare(self, *keep: str) -> "Value":
        return replace(self, tags=self.tags & set(keep), items=())


CONST = Value(rank="const")
# Tags that survive every operation; "each": one of several experts, as met in a loop.
LASTING = ("base", "depth", "each")
RANKS = ("const", "scalar", "axis", "tensor", "list")


def differ(left: ast.expr, right: ast.expr) -> bool:
    return ast.dump(left) != ast.dump(right)


def highest(values: Sequence[Value]) -> str:
    known = [RANKS.index(v.rank) for v in values if v.rank in RANKS]
    return RANKS[max(known)] if known else "other"


def union(values: Sequence[Value]) -> frozenset[str]:
    return frozenset().union(*(v.experts for v in values))


def lasting(values: Sequence[Value]) -> frozenset[str]:
    return frozenset().union(*(v.tags & set(LASTING) for v in values))


def mixed(value: Value) -> bool:
    """Made of more than one expert at once (what a loop meets is one at a time)."""
    return "each" not in value.tags and (len(value.experts) > 1 or ANY in value.experts)


def same_expert(left: Value, right: Value) -> bool:
    """Whether both values come from one and the same expert."""
    alone = len(left.experts) == 1 and ANY not in left.experts
    return left.experts == right.experts and (alone or "each" in left.tags & right.tags)


def parameter(position: int, name: str) -> Value:
    if position == 0:
        return Value(rank="dict")
    if name == "base":
        return Value(rank="tensor", tags=frozenset({"base"}))
    if name == "depth":
        return Value(rank="scalar", tags=frozenset({"depth"}))
    return CONST


def expert(name: str) -> Value:
    return Value(rank="tensor", experts=frozenset({name}))


def collection(values: list[Value]) -> Value:
    tags = frozenset().union(*(v.tags for v in values)) if values else frozenset()
    return Value(rank="list", experts=union(values), tags=tags, items=tuple(values))


def join(values: Sequence[Value]) -> Value:
    tags = frozenset().union(*(v.tags for v in values)) if values else frozenset()
    return Value(rank=highest(values), experts=union(values), tags=tags)


def element_of(value: Value) -> Value:
    """What iterating over `value` yields."""
    if value.rank == "dict":
        return Value()  # a key
    if "zipped" in value.tags:
        return Value(rank="other", experts=value.experts, items=value.items)
    if "enumerated" in value.tags:
        return Value(items=(CONST, expert(ANY).tagged("each")))
    if "pairs" in value.tags:
        return Value(items=(Value(), expert(ANY).tagged("each")))
    if "experts" in value.tags:
        return expert(ANY).tagged("each")
    if value.keys:
        return Value(keys=value.keys)
    if value.items:
        one = join(value.items)
        return one.tagged("own" if one.rank == "const" else "each")
    rank = next((t[3:] for t in value.tags if t.startswith("of_")), None)
    if rank is None:
        rank = "tensor" if value.experts else "const"
    return replace(value, rank=rank, items=()).tagged(*({"each"} if value.experts else {"own"}))


def of_dict(name: str, arguments: list[Value], nodes: list[ast.expr]) -> Value:
    everything = frozenset({ANY})
    if name == "values":
        return Value(rank="list", experts=everything, tags=frozenset({"experts"}))
    if name == "items":
        return Value(rank="list", experts=everything, tags=frozenset({"pairs"}))
    if name == "get" and nodes and isinstance(nodes[0], ast.Constant):
        return expert(str(nodes[0].value))
    return Value(rank="list")


def is_lerp(node: ast.BinOp) -> bool:
    """`x + k * (y - x)`, `0.3 * x + 0.7 * y` or `k * x + (1 - k) * y`."""
    left, right = node.left, node.right
    if not (isinstance(node.op, ast.Add | ast.Sub) and isinstance(right, ast.BinOp)):
        return False
    for part in (right.left, right.right):
        match part:
            case ast.BinOp(op=ast.Sub(), right=away) if ast.dump(away) == ast.dump(left):
                return True
    if not (isinstance(node.op, ast.Add) and isinstance(left, ast.BinOp)):
        return False
    return any(
        _complements(p, q) for p in (left.left, left.right) for q in (right.left, right.right)
    )


def _complements(p: ast.expr, q: ast.expr) -> bool:
    """Whether two factors add up to one: literals, or `k` and `1 - k`."""
    match p, q:
        case ast.Constant(value=int() | float() as k), ast.Constant(value=int() | float() as rest):
            return abs(k + rest - 1.0) < 1e-6
    for one, other in ((p, q), (q, p)):
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Sub):
            whole = isinstance(one.left, ast.Constant) and one.left.value in (1, 1.0)
            if whole and ast.dump(one.right) == ast.dump(other):
                return True
    return False
