"""Text rules: checks of the syntax tree that give clear messages to people and to the generator.

They are not a security boundary. They run in the worker, as does everything that reads source text
for the first time (a deeply nested source can crash `ast.parse` itself). The parent parses the text
of an admitted program again to tune its constants (`programs/constants.py`).
"""

import ast
import re
import string

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.worker.annotations import (
    Refuse,
    check_shape,
    expressions_in_strings,
    shape_types,
)
from sdjax.sandbox.worker.imports import IMPORTS, member_allowed, not_allowed
from sdjax.sandbox.worker.scopes import Scope, aliased, module_references


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENTRY_POINTS = ("merge_models", "merge_trees")
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
    methodcaller update_wrapper"""
)
# Special methods that a class may define.
METHODS = _words(
    """__init__ __post_init__ __call__ __len__ __iter__ __next__ __contains__ __getitem__
    __setitem__ __repr__ __str__ __hash__ __bool__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    __neg__ __abs__ __add__ __radd__ __iadd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__
    __rtruediv__ __pow__ __matmul__ __enter__ __exit__"""
)
# Names and attributes that begin with an underscore and are harmless strings or lists of names.
NAMES_ALLOWED = _words("__name__ __all__ __slots__")
ATTRIBUTES_ALLOWED = _words("__name__ __doc__")
_FORMATTER = string.Formatter()


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
    tree.body = [node for node in tree.body if not _is_main_guard(node)]
    try:
        _check_nodes(tree, Scope(), shape_types(tree))
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


def _is_main_guard(node: ast.stmt) -> bool:
    """Return whether a statement is `if __name__ == "__main__":`, which never runs here."""
    match node:
        case ast.If(
            test=ast.Compare(
                left=ast.Name(id="__name__"),
                ops=[ast.Eq()],
                comparators=[ast.Constant(value="__main__")],
            ),
            orelse=[],
        ):
            return True
    return False


def _check_nodes(tree: ast.AST, scope: Scope, array_types: frozenset[str]) -> None:
    modules = module_references(tree, scope)
    members = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    values = modules.keys() - members - set(aliased(tree))  # modules that are used as values
    checked: set[ast.AST] = set()  # names whose use was checked together with that of their parent
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)

        def refuse(rule: str, message: str, line: int = line) -> Refusal:
            return Refusal("refused", rule, f"line {line}: {message}")

        match node:
            case ast.Import() | ast.ImportFrom():
                _check_import(node, refuse)
            case ast.Attribute(value=value, attr=name):
                _check_attribute(value, name, modules.get(value), refuse)
            case ast.Call(func=ast.Name(id="getattr") as function, args=[value, name, *_]):
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    _check_attribute(value, name.value, modules.get(value), refuse)
                    checked.add(function)
            case ast.Call(func=function) if _copies_attributes(node):
                text = ast.unparse(function)
                raise refuse("attribute", f"`{text}` takes the wrapped function only")
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                raise refuse("statement", "async functions are not allowed")
            case ast.ClassDef(body=body):
                checked.update(n for n in body if getattr(n, "name", None) in METHODS)
            case ast.Subscript(value=ast.Name(id=name) as value) if name in array_types:
                check_shape(node.slice, refuse)
                checked.add(value)
            case ast.Name(id=name) if name in array_types and node not in checked:
                raise refuse("annotation", f'write `{name}[Array, "…"]` in full')
        if node in values:
            text = ast.unparse(node)
            raise refuse("module", f"`{text}` is a module; use its members, as `{text}.NAME`")
        for expression in expressions_in_strings(node, refuse):
            _check_nodes(expression, scope, array_types)
        for name in _names(node) if node not in checked else ():
            if name.startswith("__") and name not in NAMES_ALLOWED:
                raise refuse("dunder", f"the name `{name}` is not allowed")
            if name in NAMES_REFUSED:
                hint = ", except with the attribute as a string" if name == "getattr" else ""
                raise refuse("name", f"`{name}` is not allowed{hint}")


def _check_import(node: ast.Import | ast.ImportFrom, refuse: Refuse) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name not in IMPORTS:
                raise refuse("import", not_allowed(f"import {alias.name}", alias.name))
            if alias.name == "jaxtyping":
                raise refuse("import", "write `from jaxtyping import …`, with the names")
        return
    module = "." * node.level + (node.module or "")
    if module not in IMPORTS:
        raise refuse("import", not_allowed(f"from {module} import …", module))
    for alias in node.names:
        name, path = alias.name, f"{module}.{alias.name}"
        if name == "*":
            hint = f"import {module}" if "." not in module else f"import {module} as NAME"
            raise refuse("import", f"`from {module} import *` is not allowed; use `{hint}`")
        is_member = member_allowed(module, name) and name not in ATTRIBUTES_REFUSED
        if not is_member and path not in IMPORTS:
            raise refuse("import", not_allowed(f"from {module} import {name}", path))


def _check_attribute(value: ast.expr, name: str, module: str | None, refuse: Refuse) -> None:
    """Check the attribute of an expression, which may refer to a module."""
    if name.startswith("_"):
        is_own = isinstance(value, ast.Name) and value.id == "self" and name[:2] != "__"
        is_super = name in METHODS and ast.unparse(value) == "super()"
        if not (is_own or is_super or (name in ATTRIBUTES_ALLOWED and module is None)):
            raise refuse("private-attribute", f"the attribute `{name}` is not allowed")
    elif name in ATTRIBUTES_REFUSED and not (name == "format" and _is_plain_format(value)):
        hint = "; use an f-string" if name == "format" else ""
        raise refuse("attribute", f"the attribute `{name}` is not allowed{hint}")
    elif module is not None and not member_allowed(module, name):
        raise refuse("attribute", not_allowed(f"{ast.unparse(value)}.{name}", f"{module}.{name}"))


def _copies_attributes(call: ast.Call) -> bool:
    """Return whether `functools.wraps` is called with names of attributes."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name == "wraps" and (len(call.args) > 1 or bool(call.keywords))


def _is_plain_format(value: ast.expr) -> bool:
    """Return whether an expression is a string whose fields look up no attributes or items."""
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        return False
    try:
        fields = [(name or "", spec or "") for _, name, spec, _ in _FORMATTER.parse(value.value)]
    except ValueError:  # Python reports it
        return True
    return all(re.fullmatch(r"\w*", name) and "{" not in spec for name, spec in fields)


def _names(node: ast.AST) -> list[str]:
    """Return all identifiers that a node binds or reads, except attributes."""
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
            return [name]
        case ast.alias(name=_, asname=name):
            return [name] if name is not None else []
        case ast.MatchMapping(rest=str(name)):
            return [name]
        case ast.MatchClass(kwd_attrs=names):
            return list(names)
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return list(names)
    # Functions, classes, exceptions, patterns, type parameters.
    name = getattr(node, "name", None)
    return [name] if isinstance(name, str) else []
