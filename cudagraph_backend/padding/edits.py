"""What a proof changes in its copy of a graph: edits of operands, and operators written in another form."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node

from cudagraph_backend.torch_internals import expr, is_operator, operator_name, operator_schema

from . import forms, masks
from .call import Edit
from .editor import Editor
from .lattice import RefusePadding

#: The nodes of a form's results; ``None`` for one that it has not.
FormResults: TypeAlias = "tuple[Node | None, ...]"


@dataclass(slots=True)
class Edits:
    """The changes of one proof.

    Attributes:
        operands: what operators' arguments must be given, in the order in which the walk met the operators.
        forms: the operators that were written in another form, by name.
        joins_in_order: whether rows that are joined end to end are moved, so that all real ones come first.
        found_joined: whether there were any such rows.
    """

    editor: Editor
    operands: list[Edit] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    joins_in_order: bool = False
    found_joined: bool = False
    _replaced: dict[Node | None, FormResults] = field(default_factory=dict)
    _kept: frozenset[Node] | None = None

    def state(self) -> int:
        """Return what :meth:`take_back` goes back to."""
        return len(self.operands)

    def take_back(self, state: int) -> None:
        """Forget the operands' edits since ``state``."""
        del self.operands[state:]

    def write_form(self, node: Node) -> tuple[Sequence[Node], FormResults]:
        """Write ``node`` in another form in front of it; return what was made, and the nodes of its results.

        ``None`` stands for a result that the form has not.

        Raises:
            RefusePadding: it has none, or its result must stay the view that it is.
        """
        form = forms.form_of(node)
        if form is None or node in self._views_handed_out():
            raise RefusePadding("it has no other form")
        start = len(self.editor.made)
        with self.editor.before(node):
            written = form(forms.Site.of(node, self.editor))
        results = written if isinstance(written, tuple) else (written,)
        return self.editor.made[start:], tuple(None if result is None else result.node for result in results)

    def put_in_place(self, node: Node, results: FormResults) -> FormResults:
        """Let the users of ``node`` read ``results``, checked to be of the same shapes and dtypes; return these."""
        results = tuple(self._standing_for(one) for one in results)
        val = node.meta["val"]
        traced = [val] if isinstance(val, torch.Tensor) else list(val)
        pairs = zip(results, traced, strict=True)
        if not all(result is None or _is_alike(result.meta["val"], one) for result, one in pairs):
            raise RefusePadding("its other form is not like it")
        if isinstance(val, torch.Tensor):
            assert results[0] is not None
            node.replace_all_uses_with(results[0])
        elif any(results[user.args[1]] is None for user in node.users):  # type: ignore[index]
            raise RefusePadding("its other form lacks a result")
        else:
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        self._replaced[node] = results
        self.forms.append(operator_name(node.target))
        return results

    def _standing_for(self, node: Node | None) -> Node | None:
        return self._replaced[node][0] if node in self._replaced else node

    def finish(self) -> None:
        """Edit the operands, and take what nobody reads any more out of the graph."""
        masks.insert(self.editor, self.operands)
        for node in reversed(self._replaced):
            for user in list(node.users):
                self.editor.graph.erase_node(user)
            self.editor.graph.erase_node(node)
        self.editor.finish()

    def _views_handed_out(self) -> frozenset[Node]:
        if self._kept is None:
            self._kept = frozenset(_views_handed_out(self.editor.graph))
        return self._kept


def _is_alike(value: Any, traced: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != traced.dtype:
        return False
    return [*map(expr, value.shape)] == [*map(expr, traced.shape)]


def _views_handed_out(graph: Graph) -> Iterator[Node]:
    """Yield outputs that AOTAutograd makes anew as views, those of inputs and of each other, and what they view."""
    output = next(iter(reversed(graph.nodes)))
    chains = [_views(node) for node in output.all_input_nodes]
    roots = [chain[-1] for chain in chains]
    for chain in chains:
        if chain[-1].op == "placeholder" or roots.count(chain[-1]) > 1:
            yield from chain


def _views(node: Node) -> list[Node]:
    """Return a node, what it is a view of, what that is a view of, and so on."""
    chain = [node]
    while (base := _base(chain[-1])) is not None:
        chain.append(base)
    return chain


def _base(node: Node) -> Node | None:
    if node.target is operator.getitem:
        base = node.args[0]
        return base if isinstance(base, Node) and _base(base) is not None else None
    if node.op != "call_function" or not is_operator(node.target):
        return None
    returns = operator_schema(node.target).returns  # type: ignore[arg-type]
    is_view = any(result.alias_info is not None for result in returns)
    return node.all_input_nodes[0] if is_view and node.all_input_nodes else None
