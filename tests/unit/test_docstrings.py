"""What a function's docstring begins with: a verb, so that it can be read without the function's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cudagraph_backend"

# Words that sentences without a verb began with; the list names no verbs, as new ones are welcome.
NO_VERBS = frozenset(
    (
        *("A", "An", "The", "This", "That", "These", "Those", "It", "Its", "Their", "There"),
        *("All", "Any", "Both", "Each", "Either", "Every", "Everything", "No", "Nobody", "None", "Nothing", "One"),
        *("Several", "Some", "Other", "Others", "True", "False"),
        *("How", "What", "Whatever", "When", "Where", "Whether", "Which", "Who", "Why"),
        *(
            "After",
            "Along",
            "As",
            "At",
            "Before",
            "By",
            "For",
            "From",
            "If",
            "In",
            "Of",
            "On",
            "Over",
            "Per",
            "Through",
        ),
        *("Until", "While", "With", "Without"),
        *("Bytes", "Called", "Copied", "Elements", "Entries", "Indices", "Memory", "Rows", "Seconds", "Sizes"),
    )
)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Yield name, line and docstring of every function that has one; a property, a thing like a class, is none."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _is_property(node):
            said = ast.get_docstring(node)
            if said is not None:
                yield node.name, node.lineno, said


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in function.decorator_list)


def begins_with_a_verb(said: str) -> bool:
    word = said.split()[0].rstrip(",.:;")
    return word.isalpha() and word[0].isupper() and word not in NO_VERBS


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_functions_docstring_begins_with_a_verb(path: Path):
    found = docstrings(ast.parse(path.read_text(encoding="utf-8")))
    wrong = [f"{path.name}:{line} {name}: {said}" for name, line, said in found if not begins_with_a_verb(said)]
    assert not wrong


def test_docstrings_without_a_verb_are_found():
    code = '''
class Thing:
    """A thing."""

    def size(self):
        """The size."""

    @property
    def name(self):
        """The name."""

    @functools.cached_property
    def names(self):
        """All names."""

    async def wait(self):
        """``None``, after a while."""

    def told(self):
        def inner():
            """Whether it is told."""

        def silent():
            return None

        """Not a docstring."""

    def go(self):
        """Go.

        The rest may begin as it likes.
        """
'''
    found = [(name, begins_with_a_verb(said)) for name, _, said in docstrings(ast.parse(code))]
    assert sorted(found) == [("go", True), ("inner", False), ("size", False), ("wait", False)]
