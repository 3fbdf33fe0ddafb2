"""Benchmarks of sharedgraph against eager, Inductor, PyTorch's own CUDA graphs and a hand-written runner.

The way of the data::

    __main__.py  arguments → exit status
    suite.py     each job of each topic in a process of its own, with a time limit; files; the end table
    job.py       one job: the entry of such a process
    topics/      what is measured: one module per topic
    streams.py   a stream of requests served in every way: first pass, timed passes, checks
    decode.py    a Llama-shaped decode step with a slot-indexed KV cache
    runners.py   the ways of running, with one interface
    timing.py    interleaved rounds, medians, host and GPU time
    rows.py      the record of a result, and of where it was measured; CSV and JSON
    tables.py    rows → Markdown
    plots.py     rows → PNG
"""
