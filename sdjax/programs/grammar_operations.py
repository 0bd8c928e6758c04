"""Where values meet: the rules that tell operation families apart. See `families.py`.

Each rule takes the set of families found so far, adds to it, and returns what is known of the
result.
"""

import ast
from dataclasses import replace

from sdjax.programs.grammar_values import (
    CONST,
    LASTING,
    Value,
    differ,
    element_of,
    highest,
    is_lerp,
    lasting,
    mixed,
    same_expert,
    union,
)

_KEPT_BY_CONSTANTS = (
    *LASTING,
    *(
        "magnitude",
        "sign",
        "gate",
        "bounded",
        "axis_mean",
        "projection",
        "scaled_norm",
        "sum",
        "unit",
    ),
)
_SPREADS = {"norm", "std", "var", "quantile", "percentile", "median"}
_AVERAGES = {"mean", "average"}
_SUMS = {"sum", "max", "amax", "prod", "nansum"}
_DOTS = {"vdot", "dot", "inner", "einsum", "tensordot"}
_GATES = {"exp", "sigmoid", "softmax", "exp2", "logistic"}
_ELEMENTWISE = {
    "asarray",
    "array",
    "float32",
    "nan_to_num",
    "ravel",
    "flatten",
    "reshape",
    "square",
}


def product(found: set[str], node: ast.BinOp, left: Value, right: Value, out: Value) -> Value:
    tensors = [v for v in (left, right) if v.rank in ("tensor", "list")]
    if len(tensors) == 2:
        if not differ(node.left, node.right):
            return out.tagged("magnitude")
        if "sign" in left.tags and "sign" in right.tags:
            return out.tagged("product", "sign")
        tags = left.tags | right.tags
        shared = left.experts & right.experts
        if shared and "magnitude" in tags and not {"mask", "sign", "gate"} & tags:
            found.add("power")
            out = out.tagged("powered")
        for one, other in ((left, right), (right, left)):
            if "mask" in one.tags | other.tags:
                out = out.tagged(*(other.tags & {"weighted", "sum"}))
        crossed = left.experts and right.experts and not same_expert(left, right)
        return out.tagged("product") if crossed or "base" in tags else out
    for one, other in ((left, right), (right, left)):
        if one.rank == "const" and other.rank in ("tensor", "list"):
            own = "own" in one.tags
            each = "each" in other.tags
            if (mixed(other) or each) and not own:
                found.add("scaling")
            sign = (other.tags ^ one.tags) & {"negative"}
            weight = "uniform" if each and not own else "weighted"
            return other.bare(*_KEPT_BY_CONSTANTS).tagged(weight, *sign)
        if one.rank == "const" and other.rank in ("scalar", "axis"):
            return other
    for one, other in ((left, right), (right, left)):
        if one.rank == "scalar" and other.rank in ("tensor", "list"):
            if "dot" in one.tags:
                found.add("cosine_weight")
                return out.tagged("projection", *(one.tags & {"negative"}))
            if "dotted" in one.tags:
                found.add("cosine_weight")
            kept = {"weighted"}
            if "spread" in one.tags and other.experts:
                if "sign" in other.tags:
                    found.add("sign_only")
                elif "sized" in one.tags and one.experts and mixed(out):
                    found.add("norm_balance")
                if one.experts and not {"sign", "bounded"} & other.tags:
                    kept.add("scaled_norm")
            return out.tagged(*kept)
    return out.tagged(
        *((left.tags | right.tags) & {"spread", "dot", "dotted", "sized", "axis_mean"})
    )


def quotient(found: set[str], left: Value, right: Value, out: Value) -> Value:
    if left.rank in ("tensor", "list") and right.rank == "const":
        if mixed(left):
            found.add("mean")
        return left.tagged("uniform" if "each" in left.tags else "weighted")
    if left.rank in ("tensor", "list") and right.rank == "scalar" and "spread" in right.tags:
        # A tensor in units of its own spread is no balance of norms inside tanh, exp or a
        # product with that spread; the tag waits until it meets another expert.
        kept = left.tags & {"weighted", "sign", "magnitude", "negative", "projection"}
        own = left.experts and not {"powered", "magnitude", "sign"} & left.tags
        return out.tagged(*kept, *({"unit"} if own else set()))
    if left.rank == "scalar":
        if "dot" in left.tags:
            return out.tagged("dot", *(left.tags & {"negative"}))
        return out.tagged("spread", "sized") if "spread" in left.tags | right.tags else out
    return out.tagged(*(left.tags & {"weighted", "gate", "projection", "negative"}))


def total(found: set[str], node: ast.BinOp, left: Value, right: Value, out: Value) -> Value:
    minus = isinstance(node.op, ast.Sub)
    for one, other in ((left, right), (right, left)):
        if "zero" in one.tags:  # an accumulator's start
            return replace(other, tags=other.tags - {"each"})
    if out.rank in ("const", "scalar"):
        if "dot" in left.tags | right.tags:
            if "const" in (left.rank, right.rank):
                return out.tagged("dotted")
            return out.tagged("dot")
        spread = {"spread", "sized"} & (left.tags | right.tags)
        return out.tagged(*spread)
    for tensor, other in ((left, right), (right, left)):
        if tensor.rank not in ("tensor", "list"):
            continue
        if other.rank == "axis" and "axis_mean" in other.tags:
            found.add("row_mean")
        if other.rank == "scalar" and "average" in other.tags and minus:
            found.add("centre")
        if other.rank in ("const", "scalar"):
            keep = tensor.tags & {"gate", "sum", "weighted", "magnitude"}
            return out.tagged(*keep)
    if not (left.rank in ("tensor", "list") and right.rank in ("tensor", "list")):
        return out.tagged(*(left.tags | right.tags) & {"weighted", "sum"})
    removes = "projection" in right.tags and minus != ("negative" in right.tags)
    removes |= "projection" in left.tags and "negative" in left.tags
    if removes:
        found.add("projection_removal")
    apart = differ(node.left, node.right) and bool(left.experts and right.experts)
    if apart and not same_expert(left, right):
        if "unit" in left.tags | right.tags:
            found.add("norm_balance")
        normed = [v for v in (left, right) if "scaled_norm" in v.tags]
        if len(normed) == 2 or any("each" in v.tags for v in normed):
            found.add("norm_balance")
        if "weighted" in left.tags | right.tags:
            found.add("weighted_sum")
        if is_lerp(node):
            found.add("interpolation")
        return replace(out, tags=out.tags - {"each"}).tagged("sum")
    return out.tagged("sum") if apart else out


def compare(found: set[str], left: Value, right: Value) -> Value:
    out = Value(
        rank=highest([left, right]),
        experts=left.experts | right.experts,
        tags=lasting([left, right]) | {"mask"},
    )
    if "magnitude" in left.tags and "magnitude" in right.tags:
        tensors = left.rank == right.rank == "tensor" and left.experts and right.experts
        if tensors and not same_expert(left, right):
            found.add("max_magnitude")
    else:
        for one, other in ((left, right), (right, left)):
            small = other.rank in ("const", "scalar", "axis")
            if "magnitude" in one.tags and small and one.rank in ("tensor", "list"):
                found.add("magnitude_trim" if one.experts else "base_relative")
            if "product" in one.tags and other.rank == "const":
                found.add("base_relative" if "base" in one.tags else "sign_gate")
        if "sign" in left.tags and ("sign" in right.tags or right.rank == "const"):
            based = "base" in left.tags | right.tags
            found.add("base_relative" if based else "sign_gate")
    return out


def operation(
    found: set[str],
    name: str,
    nodes: list[ast.expr],
    arguments: list[Value],
    keywords: dict[str, ast.expr],
) -> Value:
    out = Value(rank=highest(arguments), experts=union(arguments), tags=lasting(arguments))
    first = arguments[0] if arguments else Value()
    axis = keywords.get("axis") or (nodes[1] if len(nodes) > 1 else None)
    if name == "enumerate":
        return Value(rank="list", experts=out.experts, items=()).tagged("enumerated")
    if name == "zip":
        return Value(
            rank="list",
            experts=out.experts,
            items=tuple(map(element_of, arguments)),
            tags=frozenset({"zipped"}),
        )
    if name in ("list", "tuple", "stack", "concatenate", "sorted", "reversed", "array"):
        return first if first.rank == "list" else replace(out, rank="list")
    if name == "len":
        return CONST
    if name == "where" and len(arguments) >= 3:
        kept = arguments[1].tags | arguments[2].tags
        branches = arguments[1:3]
        rank = highest(arguments)
        return replace(out, rank=rank).tagged(
            *(kept & {"weighted", "sum", "magnitude", "projection"}),
            *({"weighted"} if all(b.rank == "const" for b in branches) else set()),
        )
    if name in ("abs", "absolute", "square", "fabs"):
        return replace(out, rank=first.rank).tagged("magnitude")
    if name == "sign":
        return replace(out, rank=first.rank).tagged("sign")
    if name in _SPREADS or name in _AVERAGES or name in _SUMS or name == "argmax":
        if name in ("norm", "quantile", "percentile"):  # whose second argument is no axis
            axis = keywords.get("axis")
        return reduction(found, name, first, out, axis)
    if name in _DOTS:
        if name == "tensordot" and "list" in (a.rank for a in arguments):
            found.add("weighted_sum")
            return replace(out, rank="tensor").tagged("sum")
        tensors = [n for n, a in zip(nodes, arguments, strict=False) if a.rank == "tensor"]
        if len(tensors) > 1:
            same = not differ(tensors[0], tensors[1])
            return replace(out, rank="scalar").tagged("spread" if same else "dot")
        return replace(out, rank="scalar")
    if name in ("clip", "clamp"):
        if first.experts:
            found.add("clip")
        return replace(out, rank=first.rank).tagged(*(first.tags & {"dot", "spread", "sum"}))
    if name == "tanh":
        if first.experts and first.rank != "scalar":
            found.add("saturation")
        return replace(out, rank=first.rank).tagged("bounded")
    if name in _GATES:
        if first.experts and first.rank != "scalar":
            found.add("soft_gate")
        return replace(out, rank=first.rank).tagged("gate")
    if name in ("maximum", "minimum", "fmax", "fmin"):
        return extreme(found, arguments, out)
    if name in ("sqrt", "rsqrt"):
        kept = first.tags & {"spread", "dot", "magnitude", "average"}
        return replace(out, rank=first.rank).tagged(*kept)
    if name in ("zeros_like", "ones_like", "full_like", "zeros", "ones"):
        return Value(rank="tensor").tagged(*({"zero"} if "zero" in name else set()))
    if name in _ELEMENTWISE or name in ("float", "copy", "astype"):
        return first
    if name in ("multiply", "add", "subtract", "divide", "true_divide") and len(nodes) > 1:
        op = {"multiply": ast.Mult(), "add": ast.Add(), "subtract": ast.Sub()}.get(name)
        whole = ast.BinOp(left=nodes[0], op=op or ast.Div(), right=nodes[1])
        if isinstance(whole.op, ast.Mult):
            return product(found, whole, arguments[0], arguments[1], out)
        if isinstance(whole.op, ast.Div):
            return quotient(found, arguments[0], arguments[1], out)
        return total(found, whole, arguments[0], arguments[1], out)
    return out


def reduction(found: set[str], name: str, first: Value, out: Value, axis: ast.expr | None) -> Value:
    whole = axis is None or (isinstance(axis, ast.Constant) and axis.value is None)
    if first.rank == "list" and name in ("max", "amax", "argmax") and "magnitude" in first.tags:
        found.add("max_magnitude")
    numbers = "of_scalar" in first.tags or (
        bool(first.items) and all(i.rank in ("const", "scalar") for i in first.items)
    )
    if first.rank == "list" and not numbers and (not whole or name == "sum"):
        if name in _AVERAGES:
            found.add("mean")
        elif name in ("max", "amax"):
            found.add("extremes")
        elif "weighted" in first.tags or any("weighted" in i.tags for i in first.items):
            found.add("weighted_sum")
        if "unit" in first.tags or ("scaled_norm" in first.tags):
            found.add("norm_balance")
        kept = first.tags & {"mask"}
        return replace(out, rank="tensor", tags=out.tags - {"each"}).tagged("sum", *kept)
    if numbers:
        kept = first.tags & {"spread", "dot"}
        return replace(out, rank="scalar").tagged(*kept, "sized")
    if not whole:
        tags = {"axis_mean"} if name in _AVERAGES else set()
        return replace(out, rank="axis").tagged(*tags, *(first.tags & {"magnitude"}))
    out = replace(out, rank="scalar")
    if "product" in first.tags and name in _SUMS | _AVERAGES:
        return out.tagged("dot")
    if name in _SPREADS or "magnitude" in first.tags:
        return out.tagged("spread", *({"sized"} if not mixed(first) else set()))
    if name in _AVERAGES:
        return out.tagged("average")
    return out


def extreme(found: set[str], arguments: list[Value], out: Value) -> Value:
    pair = arguments[:2]
    if len(pair) == 2 and all(a.experts and a.rank == "tensor" for a in pair):
        large = all("magnitude" in a.tags for a in pair)
        if not same_expert(pair[0], pair[1]):
            found.add("max_magnitude" if large else "extremes")
        return out.tagged("magnitude") if large else out
    elif any(a.experts and a.rank == "tensor" for a in pair):
        soft = any("magnitude" in a.tags for a in pair)  # max(|x| - k, 0): a soft threshold
        found.add("magnitude_trim" if soft else "clip")
        return out.tagged("magnitude") if soft else out
    return out
