"""Takes regions from functions and models, and tries to refute a padding verdict by running them.

A verdict says what must hold for execution: run at size ``n``, run again at a bucket ``b`` with padded inputs, and
every real row must be the same. ``refutation`` does just that; it knows nothing of rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cudagraph_backend.padding.prove import Verdict, prove

Fill = Literal["replica", "zero", "poison", "extreme"]
BUCKETS = (6, 13, 20, 60, 840)
Sizes: TypeAlias = "dict[sympy.Symbol, int]"
_NUMBERS = (torch.SymInt, torch.SymFloat)


@dataclass(frozen=True, slots=True)
class Region:
    """A graph as Inductor gets it, the arguments of one call of it, and Dynamo's number for the Python frame."""

    module: GraphModule
    args: tuple[Any, ...]
    frame: int | None = None

    @property
    def metas(self) -> list[Any]:
        """What the graph says of each argument."""
        return [node.meta.get("val") for node in self.module.graph.nodes if node.op == "placeholder"]

    def sizes(self) -> dict[sympy.Symbol, int]:
        """The size of every shape symbol in this call."""
        found: dict[sympy.Symbol, int] = {}
        for meta, arg in zip(self.metas, self.args, strict=True):
            pairs: list[tuple[Any, Any]] = [(meta, arg)] if isinstance(meta, _NUMBERS) else []
            pairs += zip(meta.shape, arg.shape, strict=True) if isinstance(meta, torch.Tensor) else []
            found.update({_expr(size): real for size, real in pairs if _expr(size).is_Symbol})
        return found

    def symbols(self) -> list[sympy.Symbol]:
        """The shape symbols, in order of name."""
        return sorted(self.sizes(), key=str)

    def runs(self) -> bool:
        """Whether the graph runs at all with its own arguments."""
        try:
            _run(self.module, [_clone(arg) for arg in self.args])
        except (RuntimeError, IndexError):
            return False
        return True

    def buckets(self, *symbols: sympy.Symbol) -> list[int]:
        """A few larger sizes of ``symbols`` that the guards taken while tracing admit."""
        exact = self.sizes()
        return [b for b in BUCKETS if b > exact[symbols[0]] and self.admits(exact | dict.fromkeys(symbols, b))]

    def admits(self, sizes: Sizes) -> bool:
        """Whether the guards taken while tracing admit ``sizes``."""
        for meta in self.metas:
            for size in meta.shape if isinstance(meta, torch.Tensor) else [meta]:
                if isinstance(size, torch.SymInt):
                    return _guards_hold(size.node.shape_env, sizes)
        return True

    @property
    def names(self) -> list[str]:
        """The graph's name of each argument."""
        return [str(node.target) for node in self.module.graph.nodes if node.op == "placeholder"]

    def prove(self, *symbols: sympy.Symbol, fill: Any = "replica", masked: bool = False) -> Verdict:
        """The verdict on padding ``symbols`` together, by default all there are. ``fill`` may be one per name."""
        return prove(self.module.graph, frozenset(symbols or self.symbols()), fill, masked=masked)

    def with_masks(self, verdict: Verdict) -> Region:
        """The region with the masks that a verdict asks for, and the numbers of real rows as its last arguments."""
        if verdict.edited is None:
            return self
        counts = [torch.tensor(self.sizes()[symbol]) for symbol in verdict.counts]
        return Region(verdict.edited, (*self.args, *counts))


def dynamic(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """``tensor`` with ``dims``, the first if none is named, marked dynamic for Dynamo."""
    for dim in dims or (0,):
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def regions(function: Callable[..., Any], *args: Any, grad: bool = False, **kwargs: Any) -> list[Region]:
    """The regions of one call of ``function``, by way of Dynamo and AOTAutograd; Inductor itself is not run."""
    compiled, found = recorded(function)
    with torch.set_grad_enabled(grad):
        result = compiled(*args, **kwargs)
        if grad:
            result.backward(torch.ones_like(result))
    return found


def recorded(function: Callable[..., Any], fullgraph: bool = True) -> tuple[Callable[..., Any], list[Region]]:
    """``function`` compiled, and a list to which its calls add the regions they compile.

    Without ``fullgraph`` there may be graph breaks; each graph gives a region, again if it is compiled again.
    """
    found: list[Region] = []

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Any:
        compile_id = CompileContext.current_compile_id()
        frame = None if compile_id is None else compile_id.frame_id

        def record(inner: GraphModule, *_: Any, **__: Any) -> Any:
            return _recorder(inner, frame, found)

        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(module, inputs, inner_compile=record)

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=fullgraph), found


def region(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Region:
    """The only region of one call of ``function``."""
    (only,) = regions(function, *args, **kwargs)
    return only


def traced(function: Callable[..., Any], *args: torch.Tensor, decompose: bool = True) -> Region:
    """The region of ``function`` traced without Dynamo: quick, and if asked for, with operators left as they are."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(arg, symbolic_context=_context(arg)) for arg in args]
    with mode, enable_python_dispatcher(), torch.no_grad():
        module = make_fx(function, decomposition_table=select_decomp_table() if decompose else {})(*fakes)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Region(module, args)


def _context(arg: torch.Tensor) -> StatelessSymbolicContext:
    marked = getattr(arg, "_dynamo_dynamic_indices", ())
    kinds = [DimDynamic.DUCK if dim in marked else DimDynamic.STATIC for dim in range(arg.ndim)]
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def _guards_hold(shape_env: ShapeEnv, sizes: dict[sympy.Symbol, int]) -> bool:
    inside = all(size in shape_env.var_to_range[symbol] for symbol, size in sizes.items())
    return inside and all(guard.expr.subs(sizes) != sympy.false for guard in shape_env.guards)


def _recorder(module: GraphModule, frame: int | None, found: list[Region]) -> Callable[[list[Any]], Any]:
    def run(args: list[Any]) -> Any:
        copies = tuple(arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        found.append(Region(module, copies, frame))
        with torch.no_grad():
            return Interpreter(module).run(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def refutation(
    region: Region,
    verdict: Verdict,
    bucket: int | Mapping[sympy.Symbol, int],
    fill: Fill | Mapping[str, Fill],
    tolerance: float = 1e-5,
) -> str | None:
    """What at size ``bucket`` is not as a safe ``verdict`` promises; None if all is well.

    Dims that were proven one after the other are padded together by a bucket for each symbol.
    """
    exact = region.sizes()
    padded = exact | (dict(bucket) if isinstance(bucket, Mapping) else dict.fromkeys(verdict.symbols, bucket))
    before = _run(region.module, [_clone(arg) for arg in region.args])
    region = region.with_masks(verdict)
    fills = [fill.get(name) if isinstance(fill, Mapping) else fill for name in region.names]
    given = zip(region.metas, region.args, fills, strict=True)
    inputs = [_padded(meta, arg, exact, padded, held) for meta, arg, held in given]
    after = _run(region.module, inputs)
    metas = [*outputs_of(region.module), *region.metas]
    for index, (meta, left, right) in enumerate(zip(metas, before, after, strict=False)):  # no mask's argument
        if not isinstance(left, torch.Tensor):
            continue
        expected = tuple(_size(size, padded, found) for size, found in zip(meta.shape, left.shape, strict=True))
        if tuple(right.shape) != expected:
            return f"result {index} has shape {tuple(right.shape)} instead of {expected}"
        real = right[
            tuple(slice(0, _size(size, exact, found)) for size, found in zip(meta.shape, left.shape, strict=True))
        ]
        problem = _difference(left, real, tolerance)
        if problem:
            return f"result {index} ({fill} fill, bucket {bucket}): {problem}"
    return None


def refute(region: Region, verdict: Verdict, fill: Any = "replica", **kwargs: Any) -> str | None:
    """The first refutation at a few buckets, and if nothing was assumed of the padded rows, with hostile fills."""
    buckets = region.buckets(*verdict.symbols)
    fills: list[Any] = [fill] if verdict.needs_fill else [fill, "poison", "extreme"]
    assert buckets, "no bucket is admitted by the guards"
    found = (refutation(region, verdict, bucket, f, **kwargs) for bucket in buckets[:2] for f in fills)
    return next((problem for problem in found if problem), None)


def equal_runs(region: Region, seeds: Sequence[int]) -> bool:
    """Whether the region gives the same results with each of ``seeds``."""
    results = [_run(region.module, [_clone(arg) for arg in region.args], seed) for seed in seeds]
    pairs = [pair for pair in zip(*results, strict=True) if isinstance(pair[0], torch.Tensor)]
    return all(_difference(first, other, 0.0) is None for first, *others in pairs for other in others)


class _Repeatable(Interpreter):
    """Memory that an operator leaves uninitialised holds the same in every run, and entries draw as Inductor lets them:

    by the seed and their number in memory, whatever the size.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (torch.ops.prims.inductor_random.default, torch.ops.prims.inductor_randint.default):
            return _drawn(target, *args)
        result = super().call_function(target, args, kwargs)
        return result.fill_(_hostile(result.dtype, "poison")) if "empty" in str(target) else result


def _drawn(target: Any, *args: Any) -> torch.Tensor:
    if target is torch.ops.prims.inductor_randint.default:
        low, high, size, seed = args
        return (low + _uniform(size, seed) * (high - low)).long()
    size, seed, mode = args
    uniform = _uniform(size, seed)
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).float() if mode == "randn" else uniform.float()


def _uniform(size: Sequence[int], seed: torch.Tensor) -> torch.Tensor:
    entry = torch.arange(math.prod(size), dtype=torch.float64)
    return ((entry * 12.9898 + float(seed % 1000)).sin() * 43758.5453).frac().abs().reshape(*size)


def _run(module: GraphModule, inputs: list[Any], seed: int = 0) -> list[Any]:
    """The outputs, then the inputs as the run leaves them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs = _Repeatable(module).run(*inputs)
    return [*(_clone(output) for output in _flat(outputs)), *inputs]


def outputs_of(module: GraphModule) -> Iterator[Any]:
    """What the graph says of each output."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    for item in _flat(output.args[0]):
        yield item.meta.get("val") if isinstance(item, torch.fx.Node) else item


def _flat(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _padded(meta: Any, arg: Any, exact: Sizes, sizes: Sizes, fill: Fill | None) -> Any:
    if isinstance(meta, _NUMBERS):
        return int(_expr(meta).subs(sizes))
    if not isinstance(arg, torch.Tensor):
        return arg
    for dim, size in enumerate(_shape(meta, sizes)):
        if size != arg.shape[dim]:
            assert fill is not None, "an input that is padded has no fill"
            added = (sizes[one] - exact[one] for one in _expr(meta.shape[dim]).free_symbols)
            rows = next(filter(None, added))
            arg = _extended(arg, dim, rows, (size - arg.shape[dim]) // rows, fill)
    return _clone(arg)


def _extended(arg: torch.Tensor, dim: int, rows: int, per: int, fill: Fill) -> torch.Tensor:
    """``arg`` with ``rows`` padded rows after the real ones; a row has ``per`` entries along ``dim``."""
    if fill == "replica":
        last = arg.narrow(dim, arg.shape[dim] - per, per)
        return torch.cat([arg, *[last] * rows], dim)
    shape = [*arg.shape[:dim], rows * per, *arg.shape[dim + 1 :]]
    return torch.cat([arg, torch.full(shape, _hostile(arg.dtype, fill), dtype=arg.dtype)], dim)


def _hostile(dtype: torch.dtype, fill: Fill) -> float | int | bool:
    if fill == "zero":
        return 0
    if dtype == torch.bool:
        return fill == "poison"
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan") if fill == "poison" else torch.finfo(dtype).max
    return torch.iinfo(dtype).min if fill == "poison" else torch.iinfo(dtype).max


def _difference(left: torch.Tensor, right: torch.Tensor, tolerance: float) -> str | None:
    exact = not (left.dtype.is_floating_point or left.dtype.is_complex)
    try:
        limit = 0.0 if exact else tolerance
        torch.testing.assert_close(right, left, rtol=limit, atol=limit, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return None


def _shape(meta: Any, sizes: dict[sympy.Symbol, int]) -> tuple[int, ...]:
    return tuple(int(_expr(size).subs(sizes)) for size in meta.shape)


def _size(size: Any, sizes: dict[sympy.Symbol, int], found: int) -> int:
    """``size`` in numbers; as ``found`` at the exact sizes if it depends on data, as such a size must not change."""
    expression = _expr(size).subs(sizes)
    return found if expression.free_symbols else int(expression)


def _expr(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, _NUMBERS) else sympy.Integer(size)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
