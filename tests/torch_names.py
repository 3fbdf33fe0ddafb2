"""Which names of torch our code uses: ``python -m tests.torch_names`` prints how the installed torch declares them.

With two releases of torch, one after the other, the difference of what is printed is what to read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cudagraph_backend"
ADAPTER = PACKAGE / "torch_internals"


@dataclass(frozen=True, slots=True)
class Use:
    """A name that a module of ours reads, and the function or constant there that does."""

    name: str
    """From ``torch`` on, where it is known whose it is; else an attribute alone."""
    place: str


def is_private(name: str) -> bool:
    """Whether a part of a dotted name begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def uses_in(path: Path) -> list[Use]:
    """The names of torch, and the private attributes of other objects, that a file uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known, own = _imported(tree), _defined(tree)
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            known.update(_renamed(statement, known))
    return [
        Use(name, f"{path.stem}.{_name_of(statement)}")
        for statement in tree.body
        for name in _names_read(statement, known)
        if name.startswith("torch.") or ("." not in name and is_private(name) and name not in own)
    ]


def private_names_of_adapter() -> dict[str, set[str]]:
    """Per private name that the modules of the adapter use, where they do."""
    found: dict[str, set[str]] = {}
    for use in (use for path in sorted(ADAPTER.glob("*.py")) for use in uses_in(path)):
        if is_private(use.name):
            found.setdefault(use.name, set()).add(use.place)
    return found


def source_of(place: str) -> str:
    """The code of a function, class or constant of the adapter."""
    module, _, name = place.partition(".")
    text = (ADAPTER / f"{module}.py").read_text(encoding="utf-8")
    return "\n".join(ast.get_source_segment(text, s) or "" for s in ast.parse(text).body if _name_of(s) == name)


def imports_in(path: Path) -> Iterator[str]:
    """The full names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _imported(tree: ast.Module) -> dict[str, str]:
    """Per name that a file imports, in a function or outside, what it stands for."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {a.name.partition(".")[0] for a in node.names if a.asname is None}
            known.update({root: root for root in roots}, **{a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.ImportFrom):
            known.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return known


def _renamed(statement: ast.Assign, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What names stand for after ``aten, prims = torch.ops.aten, torch.ops.prims``."""
    target, value = statement.targets[0], statement.value
    pairs = (
        zip(target.elts, value.elts, strict=True)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        else []
    )
    for each, given in [(target, value), *pairs]:
        name = _dotted(given, known)
        if isinstance(each, ast.Name) and isinstance(given, ast.Attribute) and name is not None:
            yield each.id, name


def _defined(tree: ast.Module) -> frozenset[str]:
    """The names of a file's own functions, classes and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return frozenset(found)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _names_read(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """The longest dotted names in a piece of code; of an object that is not imported, its attribute alone."""
    name = _dotted(node, known)
    if name is not None:
        yield name
        return
    attribute = _attribute(node)
    if attribute is not None and not _is_self(attribute[0]):
        yield attribute[1]
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        for child in ast.iter_child_nodes(node):
            yield from _names_read(child, known)


def _dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    attribute = _attribute(node)
    owner = None if attribute is None else _dotted(attribute[0], known)
    return None if attribute is None or owner is None else f"{owner}.{attribute[1]}"


def _attribute(node: ast.AST) -> tuple[ast.expr, str] | None:
    """The object and the name in ``object.name``, ``getattr(object, "name")`` and ``hasattr(object, "name")``."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        name = node.args[1]
        if isinstance(name, ast.Constant):
            return node.args[0], str(name.value)
    return None


def _name_of(statement: ast.stmt) -> str:
    """What a statement at the top of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return next((target.id for target in targets if isinstance(target, ast.Name)), "")


# ---- what the installed torch says of a name

MISSING = object()


def resolved(name: str) -> Any:
    """What a dotted name stands for in the installed torch, or ``MISSING``."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return MISSING
        found = getattr(found, part, MISSING)
    return found


def declaration(name: str) -> str:
    """Its parameters with their defaults, or its type; and a digest of its source, where there is one."""
    found = resolved(name)
    if found is MISSING:
        return "missing"
    try:
        parameters = inspect.signature(found).parameters.values()
        said = f"({', '.join(_without_annotation(each) for each in parameters)})"
    except (TypeError, ValueError):
        said = (getattr(found, "__doc__", None) or "").strip().partition("\n")[0] if callable(found) else ""
    try:
        source = hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:8]
    except (TypeError, OSError):
        source = ""
    return " ".join(part for part in (type(found).__name__, said, source) if part)


def _without_annotation(parameter: inspect.Parameter) -> str:
    """With the default's name where it is a function: its address would differ every time."""
    default = getattr(parameter.default, "__name__", parameter.default)
    return str(parameter.replace(annotation=inspect.Parameter.empty, default=default))


if __name__ == "__main__":
    for each in sorted(private_names_of_adapter()):
        if each.startswith("torch."):
            print(f"{each}: {declaration(each)}")
