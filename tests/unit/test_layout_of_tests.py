"""How the tests are laid out: what several of them need is in ``tests/support``, and none imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, and what it takes of it, which may be a module, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def test_no_test_module_imports_another():
    found = {}
    for file in FILES:
        names = [name for name in imported(file) if name.startswith((".", "tests."))]
        found[file.relative_to(TESTS).as_posix()] = [
            n for n in names if any(p.startswith("test_") for p in n.split("."))
        ]
    assert len(found) > 50
    assert {file: names for file, names in found.items() if names} == {}


def test_files_of_gpu_tests_have_names_of_their_own():
    elsewhere = {file.name for file in FILES if file.parent.name != "gpu"}
    assert [file.name for file in FILES if file.parent.name == "gpu" and file.name in elsewhere] == []
