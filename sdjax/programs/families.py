"""Which families of operations a merge program belongs to, read from its syntax tree.

The source is never executed. An abstract interpreter walks it and keeps, for every value, which
experts it depends on, its rank and a few tags (a magnitude, a sign, a dot product, ...). The
operations where such values meet tell the families. It follows assignments, loops (walked twice,
so that accumulators are known), comprehensions, helper functions and lambdas; what it does not
know yields a plain value, never an error.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

FAMILIES: dict[str, str] = {
    "weighted_sum": "experts added up, at least one with a constant coefficient of its own",
    "subset": "not every expert is used",
    "mean": "the mean of experts",
    "scaling": "a sum of experts, or each expert of a loop, times one constant",
    "interpolation": "a chain of interpolations between experts",
    "norm_balance": "experts divided or weighted by norms or spreads",
    "sign_gate": "entries kept or weighted by the agreement of signs",
    "magnitude_trim": "entries kept by a threshold on their magnitude",
    "clip": "entries limited to a range",
    "row_mean": "row or column means, broadcast",
    "saturation": "tanh",
    "sign_only": "signs times one size",
    "centre": "the tensor's mean subtracted",
    "soft_gate": "entries weighted by an exponential or sigmoid",
    "power": "entries times their own magnitude",
    "extremes": "the elementwise larger or smaller of two experts",
    "cosine_weight": "strength from the cosine or dot product of two experts",
    "depth_ramp": "strength that depends on the layer's depth",
    "base_relative": "the seed's tensor is used",
    "max_magnitude": "elementwise, the expert of larger magnitude (held out of training)",
    "projection_removal": "one expert's projection on another taken away (held out of training)",
}
HELD_OUT: frozenset[str] = frozenset({"max_magnitude", "projection_removal"})

_ANY = "any"  # an expert met by iterating over the dict
_MAX_STEPS = 20_000
_MAX_CALLS = 6


@dataclass(frozen=True, kw_only=True)
class _Value:
    """What is known of a value.

    rank: "const" (a Python number), "scalar", "axis" (a row or column), "tensor", "list" (a
    collection of tensors, a stack included), "dict" (task_vectors), or "other".
    """

    rank: str = "other"
    experts: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    items: tuple["_Value", ...] = ()
    keys: tuple[str, ...] = ()  # of a dict display, or the keys that a loop over it meets

    def tagged(self, *tags: str) -> "_Value":
        return replace(self, tags=self.tags | set(tags))

    def bare(self, *keep: str) -> "_Value":
        return replace(self, tags=self.tags & set(keep), items=())


_CONST = _Value(rank="const")
# Tags that survive every operation; "each": one of several experts, as met in a loop.
_LASTING = ("base", "depth", "each")
_RANKS = ("const", "scalar", "axis", "tensor", "list")
_KEPT_BY_CONSTANTS = (
    *_LASTING,
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
_SPREADS = {"norm", "std", "var"}
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


def families_of(source: str, *, slots: int = 3) -> frozenset[str]:
    """The families found in `source`, a merge program over `slots` experts.

    Never raises: text that does not parse has no families.
    """
    try:
        tree = ast.parse(source)
        return _Reader(slots).read(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()


class _BudgetSpent(Exception):
    """The program is too long to follow; what was found so far stands."""


def _differ(left: ast.expr, right: ast.expr) -> bool:
    return ast.dump(left) != ast.dump(right)


def _highest(values: Sequence[_Value]) -> str:
    known = [_RANKS.index(v.rank) for v in values if v.rank in _RANKS]
    return _RANKS[max(known)] if known else "other"


def _union(values: Sequence[_Value]) -> frozenset[str]:
    return frozenset().union(*(v.experts for v in values))


def _lasting(values: Sequence[_Value]) -> frozenset[str]:
    return frozenset().union(*(v.tags & set(_LASTING) for v in values))


def _mixed(value: _Value) -> bool:
    """Made of more than one expert at once (what a loop meets is one at a time)."""
    return "each" not in value.tags and (len(value.experts) > 1 or _ANY in value.experts)


@dataclass
class _Reader:
    slots: int
    found: set[str] = field(default_factory=set)
    functions: dict[str, ast.FunctionDef | ast.Lambda] = field(default_factory=dict)
    steps: int = 0
    calls: int = 0

    def read(self, tree: ast.Module) -> frozenset[str]:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.functions[target.id] = node.value
        main = self.functions.get("merge_models") or self.functions.get("merge_trees")
        if not isinstance(main, ast.FunctionDef):
            return frozenset()
        env: dict[str, _Value] = {}
        for i, argument in enumerate(main.args.args + main.args.kwonlyargs):
            env[argument.arg] = _argument(i, argument.arg)
        try:
            result = self.body(main.body, env)
        except _BudgetSpent:
            return frozenset(self.found)
        used = result.experts if result is not None else frozenset()
        if used and _ANY not in used and len(used) < self.slots:
            self.found.add("subset")
        if result is not None:
            self.found |= {"depth_ramp"} if "depth" in result.tags else set()
            self.found |= {"base_relative"} if "base" in result.tags else set()
        return frozenset(self.found)

    # Statements

    def body(self, statements: Sequence[ast.stmt], env: dict[str, _Value]) -> _Value | None:
        result: _Value | None = None
        for statement in statements:
            returned = self.statement(statement, env)
            if returned is not None:
                result = returned if result is None else _join([result, returned])
        return result

    def statement(self, node: ast.stmt, env: dict[str, _Value]) -> _Value | None:
        match node:
            case ast.Return(value=value) if value is not None:
                return self.value(value, env)
            case ast.Assign(targets=targets, value=value):
                if isinstance(value, ast.Lambda) and isinstance(targets[0], ast.Name):
                    self.functions[targets[0].id] = value
                    return None
                worth = self.value(value, env)
                for target in targets:
                    self.bind(target, worth, env)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self.bind(target, self.value(value, env), env)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                whole = ast.BinOp(left=ast.Name(id=name), op=op, right=value)
                self.bind(target, self.value(whole, env), env)
            case ast.FunctionDef():
                self.functions[node.name] = node
            case ast.For(target=target, iter=iterable, body=inner):
                worth = self.value(iterable, env)
                result = None
                for _ in range(2):
                    self.bind(target, _element(worth), env)
                    result = self.body(inner, env) or result
                return result
            case ast.If(test=test, body=inner, orelse=other):
                self.value(test, env)
                results = [self.body(inner, env), self.body(other, env)]
                kept = [r for r in results if r is not None]
                return _join(kept) if kept else None
            case ast.While(body=inner) | ast.With(body=inner):
                return self.body(inner, env)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=attr, value=owner)) as call):
                added = [self.value(a, env) for a in call.args]
                if attr in ("append", "extend") and isinstance(owner, ast.Name) and added:
                    old = env.get(owner.id, _Value(rank="list"))
                    env[owner.id] = replace(_join([old, *added]), rank="list", items=())
        return None

    def bind(self, target: ast.expr, value: _Value, env: dict[str, _Value]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            parts: Sequence[_Value] = value.items
            if value.rank == "list" and "experts" in value.tags:
                parts = [_expert(f"expert_{i + 1}") for i in range(len(target.elts))]
            if len(parts) != len(target.elts):
                parts = [_element(value)] * len(target.elts)
            for element, part in zip(target.elts, parts, strict=True):
                self.bind(element, part, env)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            old = env.get(target.value.id, _Value(rank="list"))
            env[target.value.id] = replace(_join([old, value]), rank="list", items=())

    # Expressions

    def value(self, node: ast.expr, env: dict[str, _Value]) -> _Value:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise _BudgetSpent
        match node:
            case ast.Constant(value=constant):
                if not isinstance(constant, int | float):
                    return _Value()
                return _CONST if constant else _CONST.tagged("zero")
            case ast.Name(id=name):
                return env.get(name, _Value())
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
                return _collection([self.value(e, env) for e in elements])
            case ast.Dict(keys=keys, values=values):
                names = tuple(str(k.value) for k in keys if isinstance(k, ast.Constant))
                return replace(_collection([self.value(v, env) for v in values]), keys=names)
            case ast.UnaryOp(op=op, operand=operand):
                worth = self.value(operand, env)
                return worth.tagged("negative") if isinstance(op, ast.USub) else worth
            case ast.BinOp():
                return self.binary(node, env)
            case ast.Compare(left=left, comparators=rights):
                return self.compare(left, rights[0], env)
            case ast.BoolOp(values=values):
                return _join([self.value(v, env) for v in values]).bare(*_LASTING)
            case ast.IfExp(test=test, body=body, orelse=other):
                self.value(test, env)
                return _join([self.value(body, env), self.value(other, env)])
            case ast.Subscript():
                return self.subscript(node, env)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                return self.comprehension(node, env)
            case ast.Call():
                return self.call(node, env)
            case ast.NamedExpr(target=target, value=value):
                worth = self.value(value, env)
                self.bind(target, worth, env)
                return worth
            case ast.Attribute(value=owner):
                worth = self.value(owner, env)
                return worth if node.attr == "T" else _CONST
            case ast.Starred(value=inner):
                return self.value(inner, env)
        return _Value()

    def subscript(self, node: ast.Subscript, env: dict[str, _Value]) -> _Value:
        owner = self.value(node.value, env)
        index = node.slice
        if owner.rank == "dict":
            if isinstance(index, ast.Constant):
                return _expert(str(index.value))
            keys = self.value(index, env).keys or (_ANY,)
            return _Value(rank="tensor", experts=frozenset(keys), tags=frozenset({"each"}))
        if owner.rank == "list":
            if isinstance(index, ast.Slice):
                if "experts" in owner.tags and (index.lower or index.upper or index.step):
                    self.found.add("subset")
                return owner
            if owner.keys:
                return replace(_join(owner.items), items=()).tagged("own")
            if "experts" in owner.tags and isinstance(index, ast.Constant):
                if isinstance(index.value, int) and 0 <= index.value < self.slots:
                    return _expert(f"expert_{index.value + 1}")
            if isinstance(index, ast.Constant) and isinstance(index.value, int):
                if -len(owner.items) <= index.value < len(owner.items):
                    return owner.items[index.value]
            return _element(owner) if not isinstance(index, ast.Tuple) else owner
        return owner

    def comprehension(
        self,
        node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp,
        env: dict[str, _Value],
    ) -> _Value:
        inner = dict(env)
        for part in node.generators:
            self.bind(part.target, _element(self.value(part.iter, inner)), inner)
        worth = self.value(node.value if isinstance(node, ast.DictComp) else node.elt, inner)
        return replace(worth, rank="list", items=()).tagged("of_" + worth.rank)

    def binary(self, node: ast.BinOp, env: dict[str, _Value]) -> _Value:
        left, right = self.value(node.left, env), self.value(node.right, env)
        out = _Value(
            rank=_highest([left, right]),
            experts=left.experts | right.experts,
            tags=_lasting([left, right]),
        )
        match node.op:
            case ast.Mult():
                return self.product(node, left, right, out)
            case ast.Div():
                return self.quotient(left, right, out)
            case ast.Add() | ast.Sub():
                return self.sum(node, left, right, out)
            case ast.Pow():
                if isinstance(node.right, ast.Constant) and node.right.value in (2, 2.0):
                    return out.tagged("magnitude" if left.rank != "scalar" else "spread")
                if "magnitude" in left.tags and left.rank == "tensor":
                    self.found.add("power")
                return out.tagged(*left.tags & {"spread", "dot", "magnitude"})
            case ast.MatMult():
                return out
        return out

    def product(self, node: ast.BinOp, left: _Value, right: _Value, out: _Value) -> _Value:
        tensors = [v for v in (left, right) if v.rank in ("tensor", "list")]
        if len(tensors) == 2:
            if not _differ(node.left, node.right):
                return out.tagged("magnitude")
            if "sign" in left.tags and "sign" in right.tags:
                return out.tagged("product", "sign")
            if "magnitude" in left.tags | right.tags and left.experts & right.experts:
                if not {"mask", "sign", "gate"} & (left.tags | right.tags):
                    self.found.add("power")
            for one, other in ((left, right), (right, left)):
                if "sign" in one.tags and "magnitude" in other.tags:
                    out = out.tagged("shrunk")
                if "mask" in one.tags | other.tags:
                    out = out.tagged(*(other.tags & {"weighted", "sum"}))
            if left.experts and right.experts:
                out = out.tagged("product")
            elif "base" in left.tags | right.tags:
                out = out.tagged("product")
            return out
        for one, other in ((left, right), (right, left)):
            if one.rank == "const" and other.rank in ("tensor", "list"):
                own = "own" in one.tags
                each = "each" in other.tags
                if (_mixed(other) or each) and not own:
                    self.found.add("scaling")
                sign = (other.tags ^ one.tags) & {"negative"}
                weight = "uniform" if each and not own else "weighted"
                return other.bare(*_KEPT_BY_CONSTANTS).tagged(weight, *sign)
            if one.rank == "const" and other.rank in ("scalar", "axis"):
                return other
        for one, other in ((left, right), (right, left)):
            if one.rank == "scalar" and other.rank in ("tensor", "list"):
                if "dot" in one.tags:
                    self.found.add("cosine_weight")
                    return out.tagged("projection", *(one.tags & {"negative"}))
                if "dotted" in one.tags:
                    self.found.add("cosine_weight")
                tags = {"weighted"}
                if "spread" in one.tags and other.experts:
                    if "sign" in other.tags:
                        self.found.add("sign_only")
                    elif "sized" in one.tags and one.experts and _mixed(out):
                        self.found.add("norm_balance")
                    if one.experts and not {"sign", "bounded"} & other.tags:
                        tags.add("scaled_norm")
                return out.tagged(*tags)
        kept = (left.tags | right.tags) & {"spread", "dot", "dotted", "sized", "axis_mean"}
        return out.tagged(*kept)

    def quotient(self, left: _Value, right: _Value, out: _Value) -> _Value:
        if left.rank in ("tensor", "list") and right.rank == "const":
            if _mixed(left):
                self.found.add("mean")
            return left.tagged("uniform" if "each" in left.tags else "weighted")
        if left.rank in ("tensor", "list") and right.rank == "scalar" and "spread" in right.tags:
            # A tensor in units of its own spread is no balance of norms inside tanh, exp or a
            # product with that spread; the tag waits until it meets another expert.
            kept = left.tags & {"weighted", "sign", "magnitude", "negative"}
            own = left.experts and not {"product", "magnitude", "sign"} & left.tags
            return out.tagged(*kept, *({"unit"} if own else set()))
        if left.rank == "scalar":
            if "dot" in left.tags:
                return out.tagged("dot", *(left.tags & {"negative"}))
            return out.tagged("spread", "sized") if "spread" in left.tags | right.tags else out
        return out.tagged(*(left.tags & {"weighted", "gate"}))

    def sum(self, node: ast.BinOp, left: _Value, right: _Value, out: _Value) -> _Value:
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
                self.found.add("row_mean")
            if other.rank == "scalar" and "average" in other.tags and minus:
                self.found.add("centre")
            if other.rank in ("const", "scalar"):
                keep = tensor.tags & {"gate", "sum", "weighted"}
                return out.tagged(*keep)
        if not (left.rank in ("tensor", "list") and right.rank in ("tensor", "list")):
            return out.tagged(*(left.tags | right.tags) & {"weighted", "sum"})
        removes = "projection" in right.tags and minus != ("negative" in right.tags)
        removes |= "projection" in left.tags and "negative" in left.tags
        if removes:
            self.found.add("projection_removal")
        apart = _differ(node.left, node.right) and bool(left.experts and right.experts)
        alone = len(out.experts) == 1 and _ANY not in out.experts
        same = left.experts == right.experts and (alone or "each" in left.tags & right.tags)
        if apart and not same:
            if "unit" in left.tags | right.tags:
                self.found.add("norm_balance")
            normed = [v for v in (left, right) if "scaled_norm" in v.tags]
            if len(normed) == 2 or any("each" in v.tags for v in normed):
                self.found.add("norm_balance")
            if "weighted" in left.tags | right.tags:
                self.found.add("weighted_sum")
            if _is_lerp(node):
                self.found.add("interpolation")
            return replace(out, tags=out.tags - {"each"}).tagged("sum")
        return out.tagged("sum") if apart else out

    def compare(self, left_node: ast.expr, right_node: ast.expr, env: dict[str, _Value]) -> _Value:
        left, right = self.value(left_node, env), self.value(right_node, env)
        out = _Value(
            rank=_highest([left, right]),
            experts=left.experts | right.experts,
            tags=_lasting([left, right]) | {"mask"},
        )
        if "magnitude" in left.tags and "magnitude" in right.tags:
            if left.rank == right.rank == "tensor" and left.experts and right.experts:
                if _differ(left_node, right_node):
                    self.found.add("max_magnitude")
        else:
            for one, other in ((left, right), (right, left)):
                small = other.rank in ("const", "scalar", "axis")
                if "magnitude" in one.tags and small and one.rank in ("tensor", "list"):
                    self.found.add("magnitude_trim" if one.experts else "base_relative")
                if "product" in one.tags and other.rank == "const":
                    self.found.add("base_relative" if "base" in one.tags else "sign_gate")
            if "sign" in left.tags and ("sign" in right.tags or right.rank == "const"):
                based = "base" in left.tags | right.tags
                self.found.add("base_relative" if based else "sign_gate")
        return out

    # Calls

    def call(self, node: ast.Call, env: dict[str, _Value]) -> _Value:
        name = _called(node.func)
        method = isinstance(node.func, ast.Attribute) and not _is_module(node.func.value, env)
        owner = self.value(node.func.value, env) if method else None  # type: ignore[attr-defined]
        nodes = list(node.args)
        arguments = [self.value(a, env) for a in nodes]
        keywords = {k.arg: k.value for k in node.keywords if k.arg}
        if owner is not None:
            if owner.rank == "dict":
                return _of_dict(name, arguments, nodes)
            arguments, nodes = [owner, *arguments], [node.func.value, *nodes]  # type: ignore[attr-defined]
        elif name in self.functions and isinstance(node.func, ast.Name):
            return self.helper(self.functions[name], arguments)
        arguments += [self.value(v, env) for k, v in keywords.items() if k not in ("axis", "ord")]
        return self.operation(name, nodes, arguments, keywords)

    def helper(self, function: ast.FunctionDef | ast.Lambda, arguments: list[_Value]) -> _Value:
        if self.calls >= _MAX_CALLS:
            return _join(arguments)
        self.calls += 1
        try:
            env = {
                parameter.arg: value
                for parameter, value in zip(function.args.args, arguments, strict=False)
            }
            if isinstance(function, ast.Lambda):
                return self.value(function.body, env)
            return self.body(function.body, env) or _Value()
        finally:
            self.calls -= 1

    def operation(
        self,
        name: str,
        nodes: list[ast.expr],
        arguments: list[_Value],
        keywords: dict[str, ast.expr],
    ) -> _Value:
        out = _Value(rank=_highest(arguments), experts=_union(arguments), tags=_lasting(arguments))
        first = arguments[0] if arguments else _Value()
        axis = keywords.get("axis") or (nodes[1] if len(nodes) > 1 else None)
        if name == "enumerate":
            return _Value(rank="list", experts=out.experts, items=()).tagged("enumerated")
        if name == "zip":
            return _Value(
                rank="list",
                experts=out.experts,
                items=tuple(map(_element, arguments)),
                tags=frozenset({"zipped"}),
            )
        if name in ("list", "tuple", "stack", "concatenate", "sorted", "reversed", "array"):
            return first if first.rank == "list" else replace(out, rank="list")
        if name == "len":
            return _CONST
        if name == "where" and len(arguments) >= 3:
            kept = arguments[1].tags | arguments[2].tags
            branches = arguments[1:3]
            rank = _highest(arguments)
            return replace(out, rank=rank).tagged(
                *(kept & {"weighted", "sum", "magnitude", "projection"}),
                *({"weighted"} if all(b.rank == "const" for b in branches) else set()),
            )
        if name in ("abs", "absolute", "square", "fabs"):
            return replace(out, rank=first.rank).tagged("magnitude")
        if name == "sign":
            return replace(out, rank=first.rank).tagged("sign")
        if name in _SPREADS or name in _AVERAGES or name in _SUMS or name in ("argmax", "median"):
            return self.reduction(
                name, first, out, axis if name != "norm" else keywords.get("axis")
            )
        if name in _DOTS:
            if name == "tensordot" and "list" in (a.rank for a in arguments):
                self.found.add("weighted_sum")
                return replace(out, rank="tensor").tagged("sum")
            tensors = [n for n, a in zip(nodes, arguments, strict=False) if a.rank == "tensor"]
            if len(tensors) > 1:
                same = not _differ(tensors[0], tensors[1])
                return replace(out, rank="scalar").tagged("spread" if same else "dot")
            return replace(out, rank="scalar")
        if name in ("clip", "clamp"):
            if first.experts:
                self.found.add("clip")
            return replace(out, rank=first.rank).tagged(*(first.tags & {"dot", "spread", "sum"}))
        if name == "tanh":
            if first.experts and first.rank != "scalar":
                self.found.add("saturation")
            return replace(out, rank=first.rank).tagged("bounded")
        if name in _GATES:
            if first.experts and first.rank != "scalar":
                self.found.add("soft_gate")
            return replace(out, rank=first.rank).tagged("gate")
        if name in ("maximum", "minimum", "fmax", "fmin"):
            return self.extreme(arguments, nodes, out)
        if name in ("sqrt", "rsqrt"):
            kept = first.tags & {"spread", "dot", "magnitude", "average"}
            return replace(out, rank=first.rank).tagged(*kept)
        if name in ("zeros_like", "ones_like", "full_like", "zeros", "ones"):
            return _Value(rank="tensor").tagged(*({"zero"} if "zero" in name else set()))
        if name in _ELEMENTWISE or name in ("float", "copy", "astype"):
            return first
        if name in ("multiply", "add", "subtract", "divide", "true_divide") and len(nodes) > 1:
            op = {"multiply": ast.Mult(), "add": ast.Add(), "subtract": ast.Sub()}.get(name)
            whole = ast.BinOp(left=nodes[0], op=op or ast.Div(), right=nodes[1])
            if isinstance(whole.op, ast.Mult):
                return self.product(whole, arguments[0], arguments[1], out)
            if isinstance(whole.op, ast.Div):
                return self.quotient(arguments[0], arguments[1], out)
            return self.sum(whole, arguments[0], arguments[1], out)
        return out

    def reduction(self, name: str, first: _Value, out: _Value, axis: ast.expr | None) -> _Value:
        whole = axis is None or (isinstance(axis, ast.Constant) and axis.value is None)
        if first.rank == "list" and name in ("max", "amax", "argmax") and "magnitude" in first.tags:
            self.found.add("max_magnitude")
        numbers = "of_scalar" in first.tags or (
            bool(first.items) and all(i.rank in ("const", "scalar") for i in first.items)
        )
        if first.rank == "list" and not numbers and (not whole or name == "sum"):
            if name in _AVERAGES:
                self.found.add("mean")
            elif name in ("max", "amax"):
                self.found.add("extremes")
            elif "weighted" in first.tags or any("weighted" in i.tags for i in first.items):
                self.found.add("weighted_sum")
            if "unit" in first.tags or ("scaled_norm" in first.tags):
                self.found.add("norm_balance")
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
            return out.tagged("spread", *({"sized"} if not _mixed(first) else set()))
        if name in _AVERAGES:
            return out.tagged("average")
        return out

    def extreme(self, arguments: list[_Value], nodes: list[ast.expr], out: _Value) -> _Value:
        pair = arguments[:2]
        if len(pair) == 2 and all(a.experts and a.rank == "tensor" for a in pair):
            if all("magnitude" in a.tags for a in pair):
                if _differ(nodes[0], nodes[1]):
                    self.found.add("max_magnitude")
                return out.tagged("magnitude")
            if _differ(nodes[0], nodes[1]):
                self.found.add("extremes")
        elif any(a.experts and a.rank == "tensor" for a in pair):
            self.found.add("clip")
        return out


# Values


def _argument(position: int, name: str) -> _Value:
    if position == 0:
        return _Value(rank="dict")
    if name == "base":
        return _Value(rank="tensor", tags=frozenset({"base"}))
    if name == "depth":
        return _Value(rank="scalar", tags=frozenset({"depth"}))
    return _CONST


def _expert(name: str) -> _Value:
    return _Value(rank="tensor", experts=frozenset({name}))


def _collection(values: list[_Value]) -> _Value:
    tags = frozenset().union(*(v.tags for v in values)) if values else frozenset()
    return _Value(rank="list", experts=_union(values), tags=tags, items=tuple(values))


def _join(values: Sequence[_Value]) -> _Value:
    tags = frozenset().union(*(v.tags for v in values)) if values else frozenset()
    return _Value(rank=_highest(values), experts=_union(values), tags=tags)


def _element(value: _Value) -> _Value:
    """What iterating over `value` yields."""
    if value.rank == "dict":
        return _Value()  # a key
    if "zipped" in value.tags:
        return _Value(rank="other", experts=value.experts, items=value.items)
    if "enumerated" in value.tags:
        return _Value(items=(_CONST, _expert(_ANY).tagged("each")))
    if "pairs" in value.tags:
        return _Value(items=(_Value(), _expert(_ANY).tagged("each")))
    if "experts" in value.tags:
        return _expert(_ANY).tagged("each")
    if value.keys:
        return _Value(keys=value.keys)
    if value.items:
        one = _join(value.items)
        return one.tagged("own" if one.rank == "const" else "each")
    rank = next((t[3:] for t in value.tags if t.startswith("of_")), None)
    if rank is None:
        rank = "tensor" if value.experts else "const"
    return replace(value, rank=rank, items=()).tagged(*({"each"} if value.experts else {"own"}))


def _of_dict(name: str, arguments: list[_Value], nodes: list[ast.expr]) -> _Value:
    everything = frozenset({_ANY})
    if name == "values":
        return _Value(rank="list", experts=everything, tags=frozenset({"experts"}))
    if name == "items":
        return _Value(rank="list", experts=everything, tags=frozenset({"pairs"}))
    if name == "get" and nodes and isinstance(nodes[0], ast.Constant):
        return _expert(str(nodes[0].value))
    return _Value(rank="list")


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_module(node: ast.expr, env: dict[str, _Value]) -> bool:
    """Whether `node` reads as a module (`jnp`, `jnp.linalg`), not as a bound value."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id not in env


def _is_lerp(node: ast.BinOp) -> bool:
    """`x + k * (y - x)`, `0.3 * x + 0.7 * y` or `k * x + (1 - k) * y`."""
    left, right = node.left, node.right
    if not (isinstance(node.op, ast.Add | ast.Sub) and isinstance(right, ast.BinOp)):
        return False
    for part in (right.left, right.right):
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub):
            if ast.dump(part.right) == ast.dump(left):
                return True
    if not (isinstance(node.op, ast.Add) and isinstance(left, ast.BinOp)):
        return False
    return any(
        _complements(p, q) for p in (left.left, left.right) for q in (right.left, right.right)
    )


def _complements(p: ast.expr, q: ast.expr) -> bool:
    """Whether two factors add up to one: literals, or `k` and `1 - k`."""
    if isinstance(p, ast.Constant) and isinstance(q, ast.Constant):
        if isinstance(p.value, int | float) and isinstance(q.value, int | float):
            return abs(p.value + q.value - 1.0) < 1e-6
    for one, other in ((p, q), (q, p)):
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Sub):
            whole = isinstance(one.left, ast.Constant) and one.left.value in (1, 1.0)
            if whole and ast.dump(one.right) == ast.dump(other):
                return True
    return False
