"""The environment variable for debugging: what to overwrite, check or log, beyond what the options say."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cudagraph_backend.errors import OptionError

ENVIRONMENT = "SHAREDGRAPH_DEBUG"
"""The environment variable that holds words for debugging, separated by commas."""


@dataclass(frozen=True, slots=True)
class Debug:
    """What one compilation is to be debugged with; nothing, and at no cost, where the environment does not ask for it.

    Attributes:
        poison: overwrite what must not be read (scratch, padded rows, dead outputs) with NaN. Memory belongs to the
            device, so all regions there are called like this, until the next reset.
        addresses: check before every replay that the graph reads its arguments where they are.
        graphs: log what our passes change in the FX graph, as diffs (logger ``cudagraph_backend``, level ``INFO``).
    """

    poison: bool = False
    addresses: bool = False
    graphs: bool = False


def debug_of(text: str | None) -> Debug:
    """Read the environment variable's text; an empty one says nothing, as one that is not set.

    Raises:
        OptionError: an unknown word.
    """
    if not text:
        return Debug()
    known = [f.name for f in fields(Debug)]
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise OptionError(
                f"environment variable {ENVIRONMENT}: got {word!r} in {text!r}; "
                f"accepted are {', '.join(known)}, separated by commas"
            )
    return Debug(**dict.fromkeys(words, True))
