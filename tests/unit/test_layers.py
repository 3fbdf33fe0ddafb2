"""The layers of the package: which may import which, that no imports run in a circle, and the drawing in DESIGN.md."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = "cudagraph_backend"
ROOT = Path(__file__).parents[2]

RECORDS = {"errors", "fill", "region", "torch_internals"}
# A layer is a folder or a module next to them. What stands in another's set may be imported by it, and nothing else:
# compile time and call time know nothing of each other.
ALLOWED: dict[str, set[str]] = {
    "torch_internals": set(),
    "errors": set(),
    "fill": {"errors"},
    "region": {"errors", "fill", "torch_internals"},
    "debug": {"errors"},
    "graph": {"torch_internals"},
    "memory": {"fill", "torch_internals"},
    "drivers": {"errors", "memory", "torch_internals"},
    "options": {"drivers", "errors", "fill", "torch_internals"},
    "padding": {"errors", "fill", "graph", "torch_internals"},
    "compile": RECORDS | {"debug", "drivers", "graph", "memory", "options", "padding"},
    "runtime": RECORDS | {"debug", "drivers", "memory", "options"},
    "backend": RECORDS | {"compile", "debug", "drivers", "options", "runtime"},
    "report": {"backend", "fill", "memory", "region", "runtime", "torch_internals"},
    "example": {"errors", "torch_internals"},
    "warmup": {"backend", "drivers", "errors", "example", "report", "runtime", "torch_internals"},
    "__init__": {"backend", "errors", "memory", "options", "padding", "report", "warmup"},
    "demo": {"__init__", "torch_internals"},
    "__main__": {"demo"},
}
MOST_LEVELS = 12
# Where a device may be called by its name, as all that differs between platforms is there, or as users choose one.
NAMES_DEVICES = {"drivers", "torch_internals", "demo"}


@cache
def modules() -> dict[str, Path]:
    """The package's modules by dotted name, without the package's; a folder is named as its ``__init__``."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(f.relative_to(ROOT / PACKAGE).with_suffix("").parts): f for f in files}


def layer_of(module: str) -> str:
    return module.split(".")[0]


def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imported(module: str) -> frozenset[str]:
    """The modules of the package that one imports: at import, in a function, or for types only."""
    return frozenset(found for found in _imported(module) if found != module)


def _imported(module: str) -> Iterator[str]:
    here = module.split(".")[:-1]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (_module(alias.name.split(".")[1:]) for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else (node.module or "").split(".")[1:]
            if node.level and node.module:
                base = [*base, *node.module.split(".")]
            if node.level or _is_ours(node.module or ""):
                yield from (_module([*base, alias.name]) for alias in node.names)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _module(parts: list[str]) -> str:
    """The module that a dotted name is, or is a name in."""
    for path in (parts, parts[:-1]):
        for name in (".".join(path), ".".join([*path, "__init__"])):
            if name in modules():
                return name
    raise AssertionError(f"no module has {'.'.join(parts)}")


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():  # CycleError names a circle
        found[node] = 1 + max((found[below] for below in graph[node]), default=0)
    return found


def drawing() -> str:
    """The layers as a Mermaid graph, without what follows from others."""
    depth = levels(ALLOWED)
    lines = ["graph TD"]
    for layer in sorted(ALLOWED, key=lambda layer: (-depth[layer], layer)):
        implied = {below for above in ALLOWED[layer] for below in _below(above)}
        lines += [f"    {_box(layer)} --> {_box(below)}" for below in sorted(ALLOWED[layer] - implied)]
    return "\n".join(lines)


def _below(layer: str) -> set[str]:
    return ALLOWED[layer].union(*(_below(below) for below in ALLOWED[layer]))


def _box(layer: str) -> str:
    return f"api[{PACKAGE}]" if layer == "__init__" else "main[__main__]" if layer == "__main__" else layer


def test_every_layer_imports_only_what_is_below_it():
    assert {layer_of(module) for module in modules()} == set(ALLOWED)
    wrong = [
        f"{module} imports {found}"
        for module in modules()
        for found in imported(module)
        if layer_of(found) not in ALLOWED[layer_of(module)] | {layer_of(module)}
    ]
    assert not wrong


def test_all_that_is_allowed_is_needed():
    used = {(layer_of(module), layer_of(found)) for module in modules() for found in imported(module)}
    assert {(layer, below) for layer, some in ALLOWED.items() for below in some} == {(a, b) for a, b in used if a != b}


def test_no_imports_run_in_a_circle():
    levels({module: set(imported(module)) for module in modules()})
    assert max(levels(ALLOWED).values()) <= MOST_LEVELS


def test_each_name_is_that_of_one_module():
    names = Counter(path.stem for path in modules().values() if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_devices_are_called_by_name_in_drivers_only():
    naming = []
    for module in modules():
        for node in ast.walk(tree_of(module)):
            is_string = isinstance(node, ast.Constant) and node.value in ("cuda", "hip")
            is_attribute = isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda", "hip")
            if (is_string or is_attribute) and layer_of(module) not in NAMES_DEVICES:
                naming.append(f"{module}:{node.lineno}")
    assert not naming


def test_functions_are_short():
    long = [
        f"{module}.{node.name}"
        for module in modules()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef) and _lines_of_code(node) > 50
    ]
    assert not long


def _lines_of_code(function: ast.FunctionDef) -> int:
    """Without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def test_the_drawing_is_that_of_the_list():
    assert drawing() in (ROOT / "DESIGN.md").read_text(encoding="utf-8")
