"""Text rules: checks of the syntax tree that give clear messages to people and to the generator.

They are not a security boundary. They run in the worker, as does everything that reads source text
(a deeply nested source can crash `ast.parse` itself).
"""

import ast
import re
from collections.abc import Callable

from sdjax.sandbox.refusal import Refusal


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENTRY_POINTS = ("merge_models", "merge_trees")
# The algorithm API and the operations that the shipped methods are written with. None of these
# modules reaches files, weights, the registry or the engine (an import contract).
SDJAX_MEMBERS = {
    "sdjax": _words("PerExpert"),
    "sdjax.merging.algorithm": _words("PerExpert TaskVectors Tensor"),
    "sdjax.merging.method": _words("RecipeSchema"),
    "sdjax.merging.operations.geometry": _words(
        "gram linear_combination nearest_orthonormal slerp_weights"
    ),
    "sdjax.merging.operations.mixing": _words(
        """ELECT_CHOICES RESCALE_CHOICES changed_elements elected_sum keep_and_rescale
        sign_agreement weighted_sum"""
    ),
    "sdjax.merging.operations.random": _words("bernoulli bits uniform"),
    "sdjax.merging.operations.ranks": _words("outranks rank_fraction"),
    "sdjax.merging.operations.sparsify": _words(
        "random_drop random_drop_by_rank trim trim_both_ends"
    ),
    "sdjax.merging.operations.topk_threshold": _words(
        "kth_largest_magnitudes largest_mask magnitude_band_masks topk_masks"
    ),
    "sdjax.xla.reductions": _words("count_true reproducible_sum sums"),
    "jaxtyping": _words("Array Bool Float Float32 Int Int32 Key UInt32"),
}
# Dimensions of a jaxtyping annotation that `isinstance` does not evaluate as an expression.
DIMENSION = re.compile(r"\.\.\.|[*#?]*([A-Za-z_]\w*=)?(\d+|[A-Za-z_]\w*)?", re.ASCII)
IMPORTS = _words(
    """jax jax.numpy jax.lax jax.nn jax.random jax.scipy jax.scipy.linalg jax.scipy.special
    jax.scipy.stats math functools itertools typing einops numpy numpy.linalg collections
    dataclasses operator __future__"""
).union(SDJAX_MEMBERS)
# Allowed members of `jax` itself; the others access the host, the devices or the file system.
JAX_MEMBERS = _words(
    """numpy lax nn random scipy vmap jit grad value_and_grad jacfwd jacrev hessian jvp vjp tree
    tree_util checkpoint Array named_scope"""
)
NUMPY_MEMBERS_REFUSED = _words(
    """fromfile tofile load save savez savez_compressed memmap loadtxt savetxt genfromtxt fromregex
    DataSource ctypeslib ctypes random f2py testing lib core distutils open_memmap frombuffer
    show_config get_include source info lookfor"""
)
NAMES_REFUSED = _words(
    """eval exec compile open input breakpoint globals locals vars getattr setattr delattr
    help exit quit memoryview __import__ __builtins__ __loader__ __spec__ license credits
    copyright"""
)
# Attributes that lead to the interpreter, the host or the file system, or that evaluate strings or
# look up attributes by them.
ATTRIBUTES_REFUSED = _words(
    """os sys subprocess builtins ctypes io socket importlib shutil pathlib threading signal
    multiprocessing inspect pickle tempfile warnings format format_map pure_callback io_callback
    debug experimental ffi tofile dump dumps f_globals f_locals f_builtins f_back gi_frame
    gi_code cr_frame tb_frame tb_next mro to_device addressable_data
    get_type_hints ForwardRef evaluate_forward_ref singledispatch singledispatchmethod attrgetter
    methodcaller"""
)
# Syntax of an annotation that is written as a string.
TYPE_EXPRESSIONS = (
    ast.Expression,
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.BinOp,
    ast.BitOr,
    ast.Load,
)


def check_text(source: str, max_bytes: int) -> ast.Module:
    """Return the syntax tree of a candidate.

    Raises:
        Refusal: a rule is violated; the message contains the line number.
    """
    if len(source.encode("utf-8", "surrogatepass")) > max_bytes:
        raise Refusal("refused", "size", f"the source is longer than {max_bytes} bytes")
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal("refused", "encoding", "the source is not valid Unicode text") from None
    if "\0" in source:
        raise Refusal("refused", "encoding", "the source contains a NUL character")
    if not source.strip():
        raise Refusal("refused", "syntax", "the source is empty")
    if source.lstrip().startswith("```"):
        raise Refusal(
            "refused", "syntax", "line 1: a Markdown fence (```) is not Python; remove it"
        )
    try:
        tree = ast.parse(source, filename="<program>")
    except SyntaxError as error:
        raise Refusal("refused", "syntax", f"line {error.lineno or 1}: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError):
        raise Refusal("refused", "syntax", "the source is nested too deeply") from None
    try:
        _check_nodes(tree, _module_names(tree), _shape_types(tree))
    except (RecursionError, MemoryError):
        raise Refusal("refused", "syntax", "the source is nested too deeply") from None
    _check_entry_point(tree)
    return tree


def entry_point(tree: ast.Module) -> str:
    """Return the name of the merge function that the candidate defines."""
    return next(n.name for n in tree.body if _defines_entry_point(n))  # type: ignore[attr-defined]


def _defines_entry_point(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in ENTRY_POINTS


def _check_entry_point(tree: ast.Module) -> None:
    functions = [node for node in tree.body if _defines_entry_point(node)]
    if not functions:
        raise Refusal(
            "refused",
            "entry-point",
            "no function merge_models(task_vectors) or merge_trees(task_vectors) at top level",
        )
    if len(functions) > 1:
        raise Refusal(
            "refused",
            "entry-point",
            f"line {functions[1].lineno}: only one merge_models or merge_trees may be defined",
        )


def _check_nodes(tree: ast.AST, modules: dict[str, str], shape_types: frozenset[str]) -> None:
    with_shape: set[ast.AST] = set()
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)

        def refuse(rule: str, message: str, line: int = line) -> Refusal:
            return Refusal("refused", rule, f"line {line}: {message}")

        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.name not in IMPORTS:
                        raise refuse("import", f"`import {alias.name}` is not allowed")
                    if alias.name == "jaxtyping":
                        raise refuse("import", "write `from jaxtyping import …`, with the names")
            case ast.ImportFrom(module=module, names=names, level=level):
                if level or module not in IMPORTS:
                    raise refuse("import", f"`from {module or '.'} import …` is not allowed")
                for alias in names:
                    path = f"{module}.{alias.name}"
                    if alias.name == "*":
                        raise refuse("import", f"`from {module} import *` is not allowed")
                    if not _member_allowed(module, alias.name) and path not in IMPORTS:
                        raise refuse(
                            "import", f"`from {module} import {alias.name}` is not allowed"
                        )
            case ast.Attribute(value=value, attr=name):
                root = _module_of(value, modules)
                if name.startswith("_"):
                    raise refuse("private-attribute", f"the attribute `{name}` is not allowed")
                if name in ATTRIBUTES_REFUSED or (root and not _member_allowed(root, name)):
                    raise refuse("attribute", f"the attribute `{name}` is not allowed")
            case ast.AsyncFunctionDef() | ast.Await() | ast.Yield() | ast.YieldFrom():
                raise refuse("statement", "generators and async functions are not allowed")
            case ast.Subscript(value=ast.Name(id=name) as value) if name in shape_types:
                _check_shape(node.slice, refuse)
                with_shape.add(value)
            case ast.Name(id=name) if name in shape_types and node not in with_shape:
                raise refuse("annotation", f'write `{name}[Array, "…"]` in full')
        for text in _annotations(node):
            if expression := _parsed(text):
                if text in (getattr(node, "annotation", None), getattr(node, "returns", None)):
                    _check_type_expression(expression, refuse)
                _check_nodes(expression, modules, shape_types)
        for name in _names(node):
            if name.startswith("__"):
                raise refuse("dunder", f"the name `{name}` is not allowed")
            if name in NAMES_REFUSED:
                raise refuse("name", f"`{name}` is not allowed")


def _check_shape(arguments: ast.expr, refuse: Callable[[str, str], Refusal]) -> None:
    """Refuse a jaxtyping annotation unless its dimensions are plain: names, numbers, "..."."""
    match arguments:
        case ast.Tuple(elts=[_, ast.Constant(value=str(dimensions))]):
            if all(DIMENSION.fullmatch(dimension) for dimension in dimensions.split()):
                return
    raise refuse(
        "annotation", "the dimensions of an annotation must be a string of names and numbers"
    )


def _annotations(node: ast.AST) -> list[ast.Constant]:
    """Return the strings inside the annotation of a node, or inside a string of an annotation."""
    match node:
        case ast.arg(annotation=expression) | ast.AnnAssign(annotation=expression):
            pass
        case ast.FunctionDef(returns=expression) | ast.Expression(body=expression):
            pass
        case _:
            return []
    nodes = ast.walk(expression) if expression else ()
    return [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _parsed(text: ast.Constant) -> ast.Expression | None:
    """Parse a string of an annotation; None if it is text that Python cannot evaluate."""
    try:
        tree = ast.parse(str(text.value).strip(), mode="eval")
    except (SyntaxError, ValueError):
        return None
    return ast.increment_lineno(tree, text.lineno - 1)


def _check_type_expression(tree: ast.Expression, refuse: Callable[[str, str], Refusal]) -> None:
    """Refuse an annotation, written as a string, that is not a plain type such as "float"."""
    for node in ast.walk(tree):
        if not isinstance(node, TYPE_EXPRESSIONS):
            kind = type(node).__name__
            raise refuse("annotation", f"an annotation must be a type; {kind} is not allowed")


def _member_allowed(module: str, name: str) -> bool:
    if name.startswith("_") or name in ATTRIBUTES_REFUSED:
        return False
    if module == "jax":
        return name in JAX_MEMBERS
    if module in SDJAX_MEMBERS:
        return name in SDJAX_MEMBERS[module]
    if module in ("numpy", "jax.numpy"):
        return name not in NUMPY_MEMBERS_REFUSED
    return True


def _module_of(node: ast.expr, modules: dict[str, str]) -> str | None:
    """Return the module that an expression such as `jax.numpy` or `jnp` refers to."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Attribute) and (parent := _module_of(node.value, modules)):
        path = f"{parent}.{node.attr}"
        return path if path in IMPORTS else None
    return None


def _module_names(tree: ast.Module) -> dict[str, str]:
    """Map local names to modules, such as {"jnp": "jax.numpy"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if path in IMPORTS:
                    names[alias.asname or alias.name] = path
    return names


def _shape_types(tree: ast.Module) -> frozenset[str]:
    """Return the local names of jaxtyping's types of arrays, which take dimensions."""
    return frozenset(
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
        if alias.name != "Array"
    )


def _names(node: ast.AST) -> list[str]:
    """Return all identifiers that a node binds or reads, except attributes."""
    match node:
        case ast.Name(id=name) | ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.arg(arg=name):
            return [name]
        case ast.keyword(arg=str(name)):
            return [name]
        case ast.alias(asname=str(name)):
            return [name]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            return [name]
        case ast.MatchStar(name=str(name)):
            return [name]
        case ast.MatchMapping(rest=str(name)):
            return [name]
        case ast.MatchClass(kwd_attrs=names):
            return list(names)
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return list(names)
    return []
