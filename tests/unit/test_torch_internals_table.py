"""docs/torch_internals.md lists the private names of torch that we use, all of them, and they are used in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from tests.torch_names import (
    ADAPTER,
    MISSING,
    PACKAGE,
    ROOT,
    declaration,
    imports_in,
    is_private,
    private_names_of_adapter,
    resolved,
    source_of,
    uses_in,
)

ADAPTER_PACKAGE = "cudagraph_backend.torch_internals"
MODULES = sorted(path.stem for path in ADAPTER.glob("*.py") if path.stem != "__init__")
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if ADAPTER not in path.parents)
# A copy of many tensors at once, and the address of a storage, have no public name that is as fast. Operators are named
# as they stand in graphs, which users see as well.
ALLOWED_ELSEWHERE = {
    "torch._foreach_copy_",
    "torch.ops.aten._scaled_dot_product_efficient_attention.default",
    "torch.ops.aten._scaled_dot_product_efficient_attention_backward.default",
    "torch.ops.aten._to_copy.default",
    "_cdata",
}


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    places: frozenset[str]
    since: tuple[int, int]
    """The release from which on we know it; the oldest that we support, where it is older still."""
    notes: str
    tests: tuple[str, ...]


def rows() -> Iterator[Row]:
    for line in (ROOT / "docs" / "torch_internals.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            name, places, since, notes, tests = line.strip("| ").split(" | ")
            major, minor = since.split(".")
            quoted = [tuple(re.findall(r"`([^`]+)`", cell)) for cell in (name, places, tests)]
            yield Row(quoted[0][0], frozenset(quoted[1]), (int(major), int(minor)), notes, quoted[2])


ROWS = list(rows())
NAMES = [row for row in ROWS if row.name.startswith("torch.")]
ATTRIBUTES = [row for row in ROWS if not row.name.startswith("torch.")]


def test_each_private_name_is_listed_with_where_it_is_used():
    used = {name: frozenset(places) for name, places in private_names_of_adapter().items()}
    listed = {row.name: row.places for row in ROWS}
    assert len(ROWS) == len(listed)
    assert {row.name: row.places for row in NAMES if is_private(row.name)} == {
        name: places for name, places in used.items() if name.startswith("torch.")
    }
    assert {name: listed.get(name) for name in used} == used


@pytest.mark.parametrize("row", [row for row in ROWS if not is_private(row.name)], ids=lambda row: row.name)
def test_a_name_without_underscore_is_used_where_the_table_says(row: Row):
    name = row.name.rpartition(".")[2] if row in NAMES else row.name
    assert row.places
    assert [place for place in row.places if name not in source_of(place)] == []


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row.name)
def test_a_name_exists_in_the_installed_torch(row: Row):
    """One that is gone fails an import, or is called at a time that no other test reaches."""
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if release < row.since or ("CUDA builds" in row.notes and torch.version.cuda is None):
        pytest.skip("this torch need not have it")
    assert resolved(row.name) is not MISSING
    assert declaration(row.name) != "missing"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_tests_that_guard_a_name_exist(row: Row):
    assert row.tests
    for test in row.tests:
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_no_other_module_uses_a_private_name_of_torch():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in OTHERS
        for name in [*(use.name for use in uses_in(path)), *imports_in(path)]
        if is_private(name) and (name.startswith("torch.") or "." not in name) and name not in ALLOWED_ELSEWHERE
    }
    assert found == set()


def test_other_modules_import_from_the_package_not_from_its_modules():
    inside = [f"{ADAPTER_PACKAGE}.{module}" for module in MODULES]
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in OTHERS
        for name in imports_in(path)
        if name in inside or name.startswith(tuple(f"{module}." for module in inside))
    ]
    assert found == []


def test_modules_of_the_package_import_each_other_alone_and_without_circles():
    imported = {module: ours(ADAPTER / f"{module}.py") for module in MODULES}
    assert all(name.startswith(f"{ADAPTER_PACKAGE}.") for names in imported.values() for name in names)
    parts = {module: {name.split(".")[2] for name in names} for module, names in imported.items()}
    assert set().union(*parts.values()) <= set(MODULES)
    TopologicalSorter(parts).prepare()  # raises where there is a circle


def ours(path: Path) -> list[str]:
    return [name for name in imports_in(path) if name.startswith("cudagraph_backend")]


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import torch\ntorch._C._cuda_getDevice()", ["torch._C._cuda_getDevice"]),
        ("import torch._inductor.config as c\nx = c.patch(a=1)", ["torch._inductor.config.patch"]),
        ("import torch._dynamo\ntorch._dynamo.reset()", ["torch._dynamo.reset"]),
        ("from torch._guards import tracing as t\ndef f():\n    return t(None)", ["torch._guards.tracing"]),
        ("def f():\n    from torch.utils._sympy import symbol\n    symbol.x", ["torch.utils._sympy.symbol.x"]),
        ("from torch._a import Box\nBox.counter = 0", ["torch._a.Box.counter"]),
        ("from torch._a import Box\ndef f(x: list[Box]): ...", ["torch._a.Box"]),
        ("import torch\nf = getattr(torch._C, '_f', None)", ["torch._C._f"]),
        ("import torch\nf = getattr(getattr(torch, '_a', None), 'b', None)", ["torch._a.b"]),
        ("import torch\na, p = torch.ops.aten, torch.ops.prims\np._x.default", ["torch.ops.prims._x.default"]),
        ("import torch\ntorch._a.f().name._cdata", ["_cdata", "torch._a.f"]),
        ("def f(x):\n    return hasattr(x, '_y') and x.z", ["_y"]),
        (
            "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self, o):\n        return o._x",
            [],
        ),
        ("import sys\nsys._getframe()", []),
    ],
)
def test_names_that_code_uses(tmp_path: Path, code: str, names: Sequence[str]):
    (tmp_path / "code.py").write_text(code)
    assert sorted(use.name for use in uses_in(tmp_path / "code.py") if is_private(use.name)) == names
