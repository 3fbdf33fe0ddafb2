"""Reading and writing at places that a tensor holds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import sympy
import torch

from ..call import Call, by_place, is_exact, leaves, one_line, rule
from ..lattice import FREE, Fact, Operand, RefusePadding, Results, Rows, common, in_order, meet

#: Operators whose indices count from the front only.
_NEVER_NEGATIVE = (
    "aten::embedding",
    "aten::index_add",
    "aten::index_copy",
    "aten::index_reduce",
    "aten::index_select",
)


def _by_number(call: Call, name: str, operand: Operand, rows: Rows) -> Hashable:
    """Puts the rows of a tensor and of the indices into it on one line, whatever their dims are."""
    indexed = [leaf for leaf in leaves(call["indices"] or call["index"]) if isinstance(leaf, Operand) and leaf.axes]
    return 0 if call["self"].axes and indexed else by_place(call, name, operand, rows)


def _by_place_of_index(call: Call, name: str, operand: Operand, rows: Rows) -> Hashable:
    """Puts rows on one line that meet at a dim of the indices, which in the values and their mask come first."""
    indices = _by_dim(call["indices"])
    if call["self"].axes or [*indices] != [*range(len(indices))]:
        return 0
    return rows.dim - (len(operand.shape) if name == "indices" else max(len(one.shape) for one in indices.values()))


@rule("aten::embedding")
def embedding(call: Call) -> Results:
    """Looks up each row's indices in a table free of rows."""
    return _read(call, call["weight"], {0: call["indices"]}, Fact.REPLICA)


@rule("aten::index.Tensor", "aten::_unsafe_index.Tensor", line=_by_number)
def index(call: Call) -> Results:
    """Reads for each row from a tensor free of rows, or from the row itself, or does not index the rows at all."""
    return _read(call, call["self"], _by_dim(call["indices"]), _facts(call))


@rule("aten::index_select", line=_by_number)
def index_select(call: Call) -> Results:
    """Reads as :func:`index`, along one dim."""
    return _read(call, call["self"], {call["self"].dim(call["dim"]): call["index"]}, _facts(call))


@rule("aten::gather")
def gather(call: Call) -> Results:
    """Reads for each row, along another dim, from the row itself; along the indexed dim, from a tensor free of rows."""
    operand, index = call["self"], call["index"]
    dim = operand.dim(call["dim"])
    if operand.row_dim == dim:
        _places(call, operand, index, {dim})
        call.pick(index, operand, "picks rows by numbers", wraps=False)
        if index.rows is FREE:
            return FREE
        _inside(call, index)
        return call.keep(Fact.NOTHING, index)
    if index.rows is FREE:
        _fixed_entries(operand)
        return FREE
    _stays_inside(call, index, operand.shape[dim])
    if operand.rows is FREE:
        e = index.rows.dim
        if e == dim:
            return call.keep(Fact.REPLICA, index)
        if not index.rows.together:
            raise RefusePadding("rows in different places meet")
        if not operand.shape[e].is_Integer:  # guards on fixed sizes are checked per bucket, others say too little
            raise RefusePadding("takes rows out of another dynamic dim", operand.shape[e].free_symbols)
        return call.keep(Fact.NOTHING)
    _same_rows(operand, index)
    return call.keep(Fact.REPLICA)


@rule(
    "aten::scatter.reduce",
    "aten::scatter.src",
    "aten::scatter.value",
    "aten::scatter.value_reduce",
    "aten::scatter_add",
    "aten::scatter_reduce.two",
)
def scatter(call: Call) -> Results:
    """Writes each row, along another dim, into the row itself; or to where numbers say, as :func:`index_put`."""
    operand, index, source = call["self"], call["index"], call["src"]
    dim = operand.dim(call["dim"])
    if operand.row_dim == dim or (operand.rows is FREE and index.rows and index.rows.dim == dim):
        _places(call, operand, index, {dim})
        if operand.row_dim == dim:
            call.pick(index, operand, "writes to rows by numbers", wraps=False)
        if index.rows is FREE:
            if source is not None:
                _fixed_entries(source)
            return FREE if operand.rows is FREE else in_order(call.keep(Fact.ZERO, operand))
        if source is not None and source.rows is FREE:
            raise RefusePadding("rows meet a dim of another size", source.shape[dim].free_symbols)
        reduces = call["reduce"] or ("sum" if call.operator == "aten::scatter_add" else None)
        _padded_write_nothing(call, [index], source, reduces)
        return FREE if operand.rows is FREE else in_order(call.keep(Fact.NOTHING, operand))
    if index.rows is FREE:
        for other in filter(None, (operand, source)):
            _fixed_entries(other)
        return FREE if operand.rows is FREE else in_order(call.keep(Fact.ZERO, operand))
    for other in filter(None, (index, source)):
        _same_rows(operand, other)
    _stays_inside(call, index, operand.shape[dim])
    return call.keep(Fact.REPLICA)


@rule("aten::index_put", "aten::_unsafe_index_put", line=_by_place_of_index)
def index_put(call: Call) -> Results:
    """Writes ``values`` where ``indices`` say."""
    return _writes(call, _by_dim(call["indices"]), call["values"], "sum" if call["accumulate"] else None)


@rule(
    "aten::index_copy",
    "aten::index_fill.int_Scalar",
    "aten::index_fill.int_Tensor",
    "aten::index_add",
    "aten::index_reduce",
    line=one_line,
)
def index_along(call: Call) -> Results:
    """Writes along one dim."""
    source = call["source"] if call["source"] is not None else call["value"]
    reduces = "sum" if call.operator == "aten::index_add" else call["reduce"]
    return _writes(call, {call["self"].dim(call["dim"]): call["index"]}, source, reduces)


@rule("aten::slice_scatter", "aten::select_scatter", line=one_line)
def write_slice(call: Call) -> Results:
    """Writes a fixed part of another dim."""
    operand, source, dim = call["self"], call["src"], call["self"].dim(call["dim"])
    if source.rows is FREE and dim == operand.row_dim and _is_fixed_part(call):
        _fixed_entries(operand)
        return in_order(call.keep(Fact.ZERO, operand))
    if operand.rows is FREE or dim == operand.row_dim:
        raise RefusePadding("writes rows into a part of a tensor")
    drops_dim = len(source.shape) < len(operand.shape)
    if source.row_dim != operand.row_dim - (drops_dim and dim < operand.row_dim):
        raise RefusePadding("rows along different dims meet")
    return call.keep(Fact.REPLICA | Fact.ZERO)


@rule("aten::bucketize.Tensor")
def bucketize(call: Call) -> Results:
    """Finds each entry's place among boundaries free of rows."""
    call.only("self")
    return call.keep(Fact.NOTHING)


@rule("aten::searchsorted.Tensor", "aten::searchsorted.Scalar")
def searchsorted(call: Call) -> Results:
    """Finds places as :func:`bucketize`; or those of each row's entries among the row's own boundaries."""
    boundaries, entries, sorter = call["sorted_sequence"], call["self"], call["sorter"]
    if sorter is not None and sorter.rows is not FREE:
        _stays_inside(call, sorter, boundaries.shape[-1])
    if boundaries.rows is FREE and len(boundaries.shape) == 1:
        call.only("self")
        return call.keep(Fact.NOTHING)
    if boundaries.row_dim == len(boundaries.shape) - 1:
        return _among_rows(call, boundaries, entries)
    if not isinstance(entries, Operand):
        return call.keep(Fact.NOTHING)
    if entries.place == -1 and boundaries.rows is FREE:
        return call.keep(Fact.NOTHING)
    meet(*call.operands)
    return call.keep(Fact.NOTHING)


def _among_rows(call: Call, boundaries: Operand, entries: object) -> Results:
    """Finds how many rows are less than an entry, of integers: padded ones, the greatest there is, are not."""
    otherwise = "searches among the padded rows"
    is_left = not call["right"] and call["side"] in (None, "left") and call["sorter"] is None
    is_known = isinstance(entries, Operand) and is_exact(entries.dtype) and is_exact(boundaries.dtype)
    if not is_left or not is_known or len(boundaries.shape) > 1 or not boundaries.together:
        raise RefusePadding(otherwise)
    call.fill(boundaries, "highest", otherwise)
    return call.keep(Fact.NOTHING, entries) if entries.rows else FREE  # type: ignore[attr-defined, arg-type]


@rule("aten::_unsafe_masked_index_put_accumulate", line=_by_place_of_index)
def masked_index_add(call: Call) -> Results:
    """Adds to a tensor free of rows where a mask of the values' shape allows; indices need not be valid elsewhere."""
    mask, values = call["mask"], call["values"]
    if call["self"].rows is not FREE:
        raise RefusePadding("writes to rows by numbers")
    place = _place_in_selection(call["self"], _by_dim(call["indices"]))
    for one in (mask, values):
        one.check_place(place)
    mask, values = _divided_alike(call, [mask, values, *_by_dim(call["indices"]).values()])[:2]
    call.fill(mask if mask.rows else values, 0, "padded rows write to where real rows are")
    return FREE


@rule("aten::_unsafe_masked_index", line=one_line)
def masked_index(call: Call) -> Results:
    """Reads as :func:`index` where a mask of the indices' shape allows; elsewhere gives a number."""
    indices = _by_dim(call["indices"])
    own = _reads(call, call["self"], indices)
    meet(call["mask"], *indices.values())
    return call.keep(Fact.REPLICA, call["mask"], *own)


def _fixed_entries(operand: Operand) -> None:
    """Refuses rows that are not together: entries at places free of rows must be the same at every size.

    (The indices of ``gather`` and ``scatter`` can't be negative, and have no more entries than what they pick from.)
    """
    if operand.rows and not operand.rows.together:
        raise RefusePadding("rows are at other places when padded")


def _is_fixed_part(call: Call) -> bool:
    """Returns whether a part from the front is meant, and wholly inside: one cut off would not fit the source."""
    if isinstance(call["index"], int):
        return call["index"] >= 0
    start, end, step, size = call["start"] or 0, call["end"], call["step"], call["src"].shape[call["dim"]]
    return all(isinstance(n, int) and n >= 0 for n in (start, end, step)) and len(range(start, end, step)) == size


def _by_dim(indices: list[Operand | None]) -> dict[int, Operand]:
    return {dim: index for dim, index in enumerate(indices) if index is not None}


def _facts(call: Call) -> Fact:
    return Fact.REPLICA if call["self"].rows is FREE else Fact.REPLICA | Fact.ZERO


def _read(call: Call, operand: Operand, indices: Mapping[int, Operand], facts: Fact) -> Results:
    deciding = _reads(call, operand, indices)
    return call.keep(facts, *deciding) if any(one.rows for one in deciding) else FREE


def _reads(call: Call, operand: Operand, indices: Mapping[int, Operand]) -> list[Operand]:
    """Checks that each row reads from its own row, from real rows by number, or from what is free of rows.

    Returns the operands that decide what the padded rows of the result hold.
    """
    picks = _picks(operand, indices)
    for dim, index in indices.items():
        if index.dtype in (torch.bool, torch.uint8):
            raise RefusePadding("selects entries by a mask: their number depends on values")
        if dim != operand.row_dim:
            _stays_inside(call, index, operand.shape[dim])
        elif picks:
            call.pick(index, operand, "picks rows by numbers", wraps=call.operator not in _NEVER_NEGATIVE)
            _inside(call, index)
    meet(*indices.values())
    if operand.rows is not FREE and operand.row_dim not in indices and any(i.rows for i in indices.values()):
        raise RefusePadding("every row's indices are applied to every row")
    if picks:
        return list(indices.values())
    return [operand, *(index for dim, index in indices.items() if dim != operand.row_dim)]


def _picks(operand: Operand, indices: Mapping[int, Operand]) -> bool:
    """Returns whether rows are picked by number: each row by itself is no picking."""
    index = indices.get(operand.row_dim) if operand.row_dim is not None else None
    return index is not None and not _is_own(index, operand)


def _writes(call: Call, indices: Mapping[int, Operand], values: object, reduces: str | None) -> Results:
    operand: Operand = call["self"]
    picks = _picks(operand, indices)
    deciding = _reads(call, operand, indices)
    source = values if isinstance(values, Operand) else None
    is_by_row = any(index.rows for index in indices.values()) or (operand.rows and not picks)
    if source is not None and (is_by_row or source.rows):
        source.check_place(_place_in_selection(operand, indices))
    if operand.rows is not FREE and not picks:
        facts = Fact.REPLICA if source is None or source.rows is FREE else Fact.REPLICA | Fact.ZERO
        return call.keep(facts, *deciding, *filter(None, [source]))
    if is_by_row:
        _padded_write_nothing(call, [*indices.values()], source, reduces)
    if operand.rows is FREE:
        return FREE
    return in_order(call.keep(Fact.NOTHING if is_by_row else Fact.ZERO, operand))


def _padded_write_nothing(call: Call, indices: list[Operand], source: Operand | None, reduces: str | None) -> None:
    """Makes sure that padded rows, which write too, change nothing.

    They add zero, or write, once more, what the last real row writes.
    """
    otherwise = "padded rows write to where real rows are"
    together = _divided_alike(call, [*indices, *([] if source is None else [source])])
    indices, sources = together[: len(indices)], together[len(indices) :]
    if reduces in ("sum", "add"):
        if not any(one.rows for one in sources):
            raise RefusePadding(otherwise)
        for one in sources:
            if not one.holds(Fact.ZERO):
                call.fill(one, 0, otherwise)
        for index in indices:
            _inside(call, index)
    elif reduces not in (None, "amax", "amin"):
        raise RefusePadding(otherwise)
    elif not common(*together) & Fact.REPLICA:
        for one in together:
            call.fill(one, "last", otherwise)


def _divided_alike(call: Call, operands: list[Operand]) -> list[Operand]:
    """Divides rows alike in operands whose entries meet one by one, and refuses where they are not as many."""
    if len({(one.rows.count, one.rows.more) for one in operands if one.rows}) > 1:
        raise RefusePadding("rows in different places meet")
    return call.aligned(operands)


def _place_in_selection(operand: Operand, indices: Mapping[int, Operand]) -> int:
    """Returns where, counted from the end, the rows are in ``operand[indices]``."""
    dims, width = sorted(indices), max(len(index.shape) for index in indices.values())
    together = dims == list(range(dims[0], dims[-1] + 1))
    kept = [dim for dim in range(len(operand.shape)) if dim not in indices]
    before = [dim for dim in kept if together and dim < dims[0]]
    # dims of the selection: the operand's by their numbers, those of the indices counted from their end
    selection = [*before, *range(-width, 0), *kept[len(before) :]]
    place = meet(*indices.values())
    place = operand.row_dim if place is None else place
    if place not in selection:
        raise RefusePadding("rows are written where there are none")
    return selection.index(place) - len(selection)


def _is_own(index: Operand, operand: Operand) -> bool:
    """Returns whether each row picks itself."""
    picked, own = operand.rows, index.rows
    is_own = own and own.together and own.holds & Fact.OWN_INDEX
    return bool(own and is_own and picked and picked.together and picked.per == 1 and picked.extra == own.extra)


def _inside(call: Call, index: Operand) -> None:
    """Makes sure that padded rows pick a real row, the first one, where they don't repeat the last one's number."""
    if not index.holds(Fact.REPLICA):
        call.fill(index, 0, "what padded rows hold may be no valid index")


def _places(call: Call, operand: Operand, index: Operand, dims: set[int]) -> None:
    """Refuses where rows of the index lie along another dim than that by which entries are picked."""
    if index.rows and index.rows.dim not in dims:
        raise RefusePadding("rows along different dims meet", index.shape[index.rows.dim].free_symbols)
    if operand.rows and not operand.rows.together:
        raise RefusePadding("rows are at other places when padded")


def _stays_inside(call: Call, index: Operand, size: sympy.Expr) -> None:
    """Makes sure that padded rows hold valid indices, as the real rows do: by what they hold, or by a mask."""
    if index.holds(Fact.REPLICA) or (index.holds(Fact.ZERO) and size.is_positive):
        return
    if index.holds(Fact.OWN_INDEX) and not size.is_Integer:
        raise RefusePadding("rows are counted along a dim that has another size", size.free_symbols)
    if not size.is_positive:
        raise RefusePadding("what padded rows hold may be no valid index")
    call.fill(index, 0, "what padded rows hold may be no valid index")


def _same_rows(operand: Operand, other: Operand) -> None:
    if operand.rows is FREE or other.rows is FREE:
        dim = (operand.row_dim or 0) if other.row_dim is None else other.row_dim
        link = operand.shape[dim].free_symbols | other.shape[dim].free_symbols
        raise RefusePadding("rows meet a dim of another size", link)
    mine, others = ((rows.dim, rows.count, rows.more) for rows in (operand.rows, other.rows))
    if mine != others:
        raise RefusePadding("rows along different dims meet")
