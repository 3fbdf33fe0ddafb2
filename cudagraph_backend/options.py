"""The backend's options: frozen, and parsed strictly, whichever way they come in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from cudagraph_backend import torch_internals
from cudagraph_backend.drivers.platforms import DRIVERS, unavailable
from cudagraph_backend.errors import OptionError
from cudagraph_backend.fill import WORDS, Fill, Fills

Pad = Literal["prove", "probe", "assume", "off"]
OnOverwrite = Literal["preserve", "error"]
DriverName: TypeAlias = str
"""``"auto"``, ``"off"`` or the name of a platform."""
Verify = Literal["off", "capture"]
Capture = Literal["auto", "always"]

_CHOICES = {
    "pad": get_args(Pad),
    "on_overwrite": get_args(OnOverwrite),
    "driver": ("auto", *DRIVERS, "off"),
    "verify": get_args(Verify),
    "capture": get_args(Capture),
}
_MAX_SIZE = 2**31 - 1
_OPERATOR = re.compile(r"\w+::\w+(\.\w+)?")

ENVIRONMENT = "SHAREDGRAPH_OPTIONS"
"""The environment variable that holds options as a JSON object."""

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, slots=True)
class Options:
    """What ``torch.compile(..., backend="sharedgraph", options={...})`` accepts.

    What is not given there is what ``cudagraph_backend.configure`` says, else the environment variable
    ``SHAREDGRAPH_OPTIONS`` (a JSON object), else the default.

    Attributes:
        capture_sizes: sizes of a dynamic dim to capture graphs for (ascending, unique), or ``"auto"``: from the dim's
            bounds (``mark_dynamic(max=…)``), or growing with the sizes that are seen.
        pad: pad a dynamic dim up to a capture size if that is proven safe (``"prove"``), where there is no proof also
            if test runs at capture show nothing against it (``"probe"``), always (``"assume"``: wrong values if a real
            row depends on a padded one), or never (``"off"``).
        fill: what padded rows of inputs hold: copies of the last real row (``"replica"``), ``"zero"``, a number, or by
            input name one of these, ``{"labels": -100}``; inputs that are not named hold replicas. A name is the last
            identifier of the way to an input (``labels`` for ``batch["labels"]``) or all of it (``batch.labels``).
        on_overwrite: what happens to an output of an earlier step that is alive when its memory is needed: it stays
            (``"preserve"``), or later accesses to it raise (``"error"``), as with PyTorch's own CUDA graph trees.
        driver: ``"cuda"`` captures CUDA graphs, ``"host"`` runs the same machinery on the CPU, ``"auto"`` takes the
            one that fits a region's device, ``"off"`` runs the compiled regions as they are.
        capture: ``"auto"`` keeps a graph unless replaying it measures slower than the plain call (regions without
            side effects, on a GPU; never with ``strict``), ``"always"`` keeps all.
        strict: raise ``RefusalError`` where a refusal would be counted.
        max_graphs: the most graphs one region may hold; beyond it the compiled region runs.
        verify: ``"capture"`` makes the probe's test runs for all dims, proven or assumed safe, too.
        uncapturable_ops: operators that must run at every call, as they read what no graph sees (a Python object that
            describes the batch): ``"mylib::op"``, or one overload, ``"mylib::op.Tensor"``. Graphs are captured around
            them. A name may be that of an operator that is registered later.
        inductor: settings passed to Inductor, e.g. ``{"max_autotune": True}``.
    """

    capture_sizes: tuple[int, ...] | Literal["auto"] = "auto"
    pad: Pad = "prove"
    fill: Fills = "replica"
    on_overwrite: OnOverwrite = "preserve"
    driver: DriverName = "auto"
    capture: Capture = "auto"
    strict: bool = False
    max_graphs: int = 512
    verify: Verify = "off"
    uncapturable_ops: tuple[str, ...] = ()
    inductor: Mapping[str, Any] = field(default_factory=dict)


def options_of(
    given: Mapping[str, Any] | None, mode: str | None, configured: Mapping[str, Any], environment: str | None
) -> Options:
    """Return the options of one compilation: those given, else what its mode, ``configure`` or the environment says.

    Raises:
        OptionError: a bad option in ``given`` or the environment, or an unknown mode.
    """
    layers = (environment_options(environment), configured, mode_options(mode), checked_options(given))
    return Options(**merged_options(layers))


def merged_options(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge checked options from several places, by option (``inductor``: setting by setting); later ones win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        settings = {**merged.get("inductor", {}), **layer.get("inductor", {})}
        merged.update(layer)
        if settings:
            merged["inductor"] = settings
    return merged


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return what a ``mode`` of ``torch.compile`` means here: its settings of Inductor, those of CUDA graphs apart."""
    if mode is None:
        return {}
    if not isinstance(mode, str) or mode not in _MODES:
        accepted = f"None, {', '.join(map(repr, _MODES))}; settings of Inductor: options={{'inductor': {{...}}}}"
        raise OptionError(f"mode: got {mode!r}; accepted is {accepted}")
    settings = torch_internals.mode_settings(mode)
    return {"inductor": {name: value for name, value in settings.items() if not _is_about_graphs(name)}}


def environment_options(text: str | None) -> dict[str, Any]:
    """Read and check the options in the environment variable's text; an empty one is as one that is not set."""
    if not text:
        return {}
    accepted = 'a JSON object of option names to values, such as {"pad": "off"}'
    try:
        given = json.loads(text)
    except ValueError as error:
        raise OptionError(
            f"environment variable {ENVIRONMENT}: got {text!r}; accepted is {accepted} ({error})"
        ) from None
    if not isinstance(given, dict):
        raise OptionError(f"environment variable {ENVIRONMENT}: got {text!r}; accepted is {accepted}")
    try:
        return checked_options(given)
    except OptionError as error:
        raise OptionError(f"environment variable {ENVIRONMENT}: {error}") from None


def checked_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check every option given.

    Raises:
        OptionError: an unknown name, a wrong type or an impossible value.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise OptionError(f"options: got {given!r}; accepted is a dict of option names to values")
    names = [f.name for f in fields(Options)]
    for name in given:
        if name not in names:
            raise OptionError(f"option {name!r} is unknown; accepted are {', '.join(names)}")
    return {name: _checked(name, value) for name, value in given.items()}


def _checked(name: str, value: Any) -> Any:
    if name in _CHOICES:
        return _checked_choice(name, value)
    return _CHECKS[name](value)


def _checked_choice(name: str, value: Any) -> str:
    accepted = _CHOICES[name]
    if not isinstance(value, str) or value not in accepted:
        raise _error(name, value, "one of " + ", ".join(map(repr, accepted)))
    if name == "driver" and value in DRIVERS and (lacking := unavailable(value)) is not None:
        raise _error(name, value, f"{value!r} only where {lacking}; use 'auto' or 'host' here")
    return value


def _checked_capture_sizes(value: Any) -> tuple[int, ...] | Literal["auto"]:
    accepted = f"'auto' or a non-empty list of ints from 1 to {_MAX_SIZE}"
    if isinstance(value, str) and value == "auto":
        return "auto"
    if not isinstance(value, (list, tuple, range)) or not value:
        raise _error("capture_sizes", value, accepted)
    for size in value:
        if type(size) is not int or not 1 <= size <= _MAX_SIZE:
            raise _error("capture_sizes", value, f"{accepted} (it holds {size!r})")
    return tuple(sorted(set(value)))


def _checked_fill(value: Any) -> Fills:
    words = ", ".join(map(repr, WORDS))
    if not isinstance(value, Mapping):
        return _checked_one_fill(value, value, f"{words}, a number, or a dict of input names to these")
    accepted = f"a non-empty dict of input names to {words} or a number"
    if not value:
        raise _error("fill", value, accepted)
    for name, one in value.items():
        if not isinstance(name, str) or not name:
            raise _error("fill", value, f"{accepted} (it holds the name {name!r})")
        _checked_one_fill(one, value, f"{accepted} (it holds {one!r} for {name!r})")
    return dict(value)


def _checked_one_fill(one: Any, value: Any, accepted: str) -> Fill:
    if isinstance(one, (int, float)) or (isinstance(one, str) and one in WORDS):
        return one  # type: ignore[return-value]
    raise _error("fill", value, accepted)


def _checked_strict(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error("strict", value, "True or False")
    return value


def _checked_max_graphs(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _error("max_graphs", value, "an int of at least 1; to capture nothing use driver='off'")
    return value


def _checked_uncapturable_ops(value: Any) -> tuple[str, ...]:
    accepted = "a list of operators' names, as ['mylib::op'] or with an overload ['mylib::op.Tensor']"
    if not isinstance(value, (list, tuple)):
        raise _error("uncapturable_ops", value, accepted)
    for name in value:
        if not isinstance(name, str) or not _OPERATOR.fullmatch(name):
            raise _error("uncapturable_ops", value, f"{accepted} (it holds {name!r})")
    return tuple(value)


def _checked_inductor(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _error("inductor", value, "a dict of Inductor's setting names to values")
    for key in value:
        if _is_about_graphs(key):
            raise _error("inductor", value, f"settings other than {key!r}: this backend captures the graphs itself")
    try:
        return torch_internals.checked_inductor_options(dict(value))
    except RuntimeError as error:
        if "Unexpected optimization option" not in str(error):
            raise _error("inductor", value, f"values of the settings' types ({error})") from None
        unknown = [key for key in value if key.replace("-", "_") not in torch_internals.inductor_option_names()]
        raise _error(
            "inductor", value, f"settings of torch._inductor.config, which has no {', '.join(map(repr, unknown))}"
        ) from None


def _is_about_graphs(setting: str) -> bool:
    """Return whether a setting of Inductor is one of stock's CUDA graphs."""
    return setting.replace("-", "_").startswith("triton.cudagraph")


def _error(name: str, value: Any, accepted: str) -> OptionError:
    return OptionError(f"option {name!r}: got {value!r}; accepted is {accepted}")


_CHECKS = {
    "capture_sizes": _checked_capture_sizes,
    "fill": _checked_fill,
    "strict": _checked_strict,
    "max_graphs": _checked_max_graphs,
    "uncapturable_ops": _checked_uncapturable_ops,
    "inductor": _checked_inductor,
}
