"""The demo: one stream of requests with changing batch size, run in every way, each result checked.

The way of the data::

    cli.py       arguments → exit status; the only composer
    models.py    the modules that are served
    workload.py  the seeded stream of requests for a model
    ways.py      eager, inductor, reduce-overhead, sharedgraph: run the stream, time it, check it
    page.py      the results as a table and as JSON
"""

from __future__ import annotations


class DemoError(Exception):
    """The demo can't run as asked; the message says what is wrong and what cures it."""
