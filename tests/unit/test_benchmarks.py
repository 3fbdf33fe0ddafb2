"""The benchmark suite on made-up data: rows and their files, tables, plots, timing, the hand-written runner."""

from __future__ import annotations

import csv
import dataclasses
import math
import random
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import decode, micro_call, plots, rows, runners, streams, suite, tables, timing, topics
from benchmarks.rows import Environment, Row
from benchmarks.topics import host_cost, irregular

WHERE = Environment("NVIDIA H100 80GB HBM3", "1.2", "2.11", "3.6", "3.12", "abc1234", "2026-01-02")
CPU = torch.device("cpu")
SERIES = [Row("memory", "hidden", "sharedgraph", "GPU memory", "MiB", 4.0, step=step) for step in (1, 2, 3)]
RESULTS = [
    Row("memory", "hidden", "sharedgraph", "GPU memory", "MiB", 4.0, error=1e-3, tolerance=0.1, settings={"layers": 2}),
    Row("memory", "hidden", "hand-written", "GPU memory", "MiB", 4.5, 4.25, 1234.5, samples=3),
    Row("memory", "hidden", "hand-written", "graphs", "", 3),
    rows.left_out("memory", "hidden", "reduce-overhead", "needs CUDA"),
]


def test_rows_survive_json_and_csv(tmp_path: Path):
    found = [*SERIES, *RESULTS]
    rows.write_json(tmp_path / "a.json", WHERE, found)
    rows.write_csv(tmp_path / "a.csv", WHERE, found)
    assert rows.read_json(tmp_path / "a.json") == (WHERE, found)
    with (tmp_path / "a.csv").open(encoding="utf-8") as source:
        lines = list(csv.DictReader(source))
    assert len(lines) == len(found)
    assert lines[3]["settings"] == "layers=2"
    assert {line["gpu"] for line in lines} == {WHERE.gpu}


@pytest.mark.parametrize(("error", "wrong"), [(0.05, False), (0.2, True), (math.inf, True), (math.nan, True)])
def test_a_result_is_wrong_above_the_tolerance(tmp_path: Path, error: float, wrong: bool):
    row = Row("t", "c", "w", "m", "s", 1.0, error=error, tolerance=0.1)
    assert row.wrong == wrong
    rows.write_json(tmp_path / "a.json", WHERE, [row])
    assert rows.read_json(tmp_path / "a.json")[1][0].wrong == wrong


def test_short_name_of_a_gpu():
    assert WHERE.short_gpu == "h100"
    assert rows.environment("cpu", "abc").short_gpu == "cpu"


def test_tables_show_results_and_leave_series_out(tmp_path: Path):
    rows.write_json(tmp_path / "memory_h100.json", WHERE, [*SERIES, *RESULTS])
    (tmp_path / "demo.json").write_text("{}", encoding="utf-8")  # not ours
    text = tables.of_folder(tmp_path)
    assert "| hand-written | 4.5 MiB (4.25 to 1234) | 3 |" in text
    assert "| sharedgraph | 4 MiB |  |" in text
    assert "- reduce-overhead: needs CUDA" in text


def test_a_wrong_result_is_named_in_both_tables():
    row = Row("t", "c", "w", "m", "s", 1.0, error=1.0, tolerance=0.1)
    assert "WRONG RESULTS: w, c" in tables.of_topic(WHERE, [row])
    text = suite.end_table([suite.Outcome("t", 1, 2.0, (row,), ("w, c: off",))])
    assert "1 problems" in text
    assert "t: w, c: off" in text


@pytest.mark.parametrize("found", [SERIES, RESULTS])
def test_plots(tmp_path: Path, found: list[Row]):
    pytest.importorskip("matplotlib")
    plots.draw(tmp_path / "a.png", WHERE, found)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_line_far_above_the_others_is_told_of_and_not_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    far = [dataclasses.replace(row, way="cudagraphs", median=900.0) for row in SERIES]
    plots._lines(axis, [*SERIES, *far])
    assert [list(line.get_ydata()) for line in axis.lines] == [[4.0, 4.0, 4.0], []]
    assert "cudagraphs, up to 900 MiB" in axis.get_title()
    pyplot.close(figure)


def test_spread_and_interleaving():
    assert timing.spread([1.0, 2.0, 3.0], scale=10) == timing.Spread(20.0, pytest.approx(14), pytest.approx(26), 3)
    order: list[str] = []
    measures = {name: (lambda name=name: order.append(name) or 1.0) for name in "ab"}
    assert timing.interleaved(measures, 2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "a", "b"]


def test_times_are_seconds_per_call():
    for seconds in (timing.enqueue_seconds(lambda: time.sleep(0.01), 3, CPU), timing.wall_seconds(lambda: None, CPU)):
        assert 0 <= seconds < 0.5
    assert timing.enqueue_seconds(lambda: time.sleep(0.01), 3, CPU) >= 0.01


def test_relative_error():
    expected = torch.tensor([2.0, -4.0])
    assert runners.relative_error(torch.tensor([2.0, -3.0]), expected) == 0.25
    assert runners.relative_error(torch.tensor([math.nan, -4.0]), expected) == math.inf
    assert runners.relative_error(torch.tensor([2.0]), expected) == math.inf


def test_the_random_walk_uses_each_slot_once_and_stays_within_its_bounds():
    shape = decode.Shape(8, 8, 1, layers=1, vocabulary=8, slots=6, context=4, logits=True)
    sizes = set()
    for ids, slots, positions in decode.random_walk(100, shape, CPU, stride=2):
        sizes.add(len(ids))
        assert len(set(slots.tolist())) == len(ids) == len(slots)
        assert 0 <= positions.min() <= positions.max() < shape.context
        assert slots.max() < shape.slots
    assert sizes == set(range(1, 7))


def test_the_hand_written_runner_sends_padded_rows_to_a_slot_that_nobody_uses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    shape = decode.Shape(8, 8, 2, layers=1, vocabulary=8, slots=4, context=4, logits=True)
    ours, eager = (decode.build_decoder(shape, CPU, torch.float32) for _ in range(2))
    runner = runners.HandWritten(runners.Model(ours, decode.first_step(4, shape, CPU), (2, 4), ours.padding))
    for batch in decode.random_walk(20, shape, CPU, stride=2):
        torch.testing.assert_close(runner(*batch), eager(*batch))
    torch.testing.assert_close(ours.layers[0].keys[:-1], eager.layers[0].keys[:-1])


def served_stream(monkeypatch: pytest.MonkeyPatch, way: runners.Way, **settings: object) -> list[Row]:
    """Serve three batches without compiling anything."""
    monkeypatch.setattr(runners, "warm_up_compiler", lambda device: None)
    stream = streams.Stream(
        topic="t",
        case="c",
        requests=[(torch.ones(count),) for count in (1, 2, 3)],
        prepare=lambda way: way.prepare(runners.Model(lambda x: 2 * x, (), (), ())),
        tolerance=0.1,
        settings={},
        **settings,
    )
    return streams.run_stream(stream, (runners.EAGER, way), topics.Settings(CPU, quick=True))


def test_a_stream_tells_the_percentiles_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    found = served_stream(monkeypatch, runners.Way("same", lambda model: model.fn), percentiles=(10, 90))
    asked = {row.metric: row.median for row in found if row.way == "same" and "percentile" in row.metric}
    assert list(asked) == ["10th percentile", "90th percentile"]
    assert asked["10th percentile"] <= asked["90th percentile"]


def test_a_shuffled_stream_serves_everything_in_other_orders(monkeypatch: pytest.MonkeyPatch):
    served: list[int] = []

    def prepare(model: runners.Model) -> runners.Served:
        return lambda x: served.append(len(x)) or model.fn(x)

    served_stream(monkeypatch, runners.Way("same", prepare), shuffled=True, timed_passes=5)
    passes = [tuple(served[start : start + 3]) for start in range(2, len(served), 3)]  # behind the two extremes
    assert len(passes) == 2 + 5 + 1
    assert all(sorted(each) == [1, 2, 3] for each in passes)
    assert {passes[0], passes[1], passes[-1]} == {(1, 2, 3)}
    assert len(set(passes[2:-1])) > 1


@pytest.mark.parametrize("must_be_right", [False, True])
def test_a_way_that_must_be_right_is_not_timed_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch, must_be_right: bool):
    found = served_stream(monkeypatch, runners.Way("off", lambda model: lambda x: 3 * x), must_be_right=must_be_right)
    off = [row for row in found if row.way == "off"]
    if must_be_right:
        assert [row.metric for row in off] == [rows.LEFT_OUT]
        assert off[0].note.startswith("failed: ArithmeticError: off by 5.0e-01")
    else:
        assert len(off) > 1
        assert all(row.wrong for row in off)


def test_steps_of_a_quarter():
    sizes = sorted({irregular.quarter_step(size) for size in range(1, 65)})
    assert sizes == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert all(size <= irregular.quarter_step(size) <= size * 1.25 for size in range(1, 5000))


def test_no_edge_of_a_batch_joins_two_graphs():
    sizes, draw = irregular.QUICK_GRAPHS, random.Random(0)
    for _ in range(20):
        x, edges, graph, bounds = irregular.draw_graphs(sizes, draw, CPU)
        assert torch.equal(graph[edges[0]], graph[edges[1]])
        assert torch.equal(graph.bincount(), bounds.diff())
        assert len(x) == len(graph) == bounds[-1]
        assert sizes.graphs[0] < len(bounds) <= sizes.graphs[1] + 1


@pytest.mark.parametrize("with_torch_geometric", [False, True])
def test_graphs_that_are_padded_by_hand_give_the_same_results(
    monkeypatch: pytest.MonkeyPatch, with_torch_geometric: bool
):
    if with_torch_geometric:
        pytest.importorskip("torch_geometric")
    else:
        own = irregular.Convolution, irregular.add_pool, "index_add"
        monkeypatch.setattr(irregular, "graph_operators", lambda: own)
    torch.manual_seed(0)
    module, draw = irregular.GraphNetwork(irregular.QUICK_GRAPHS).eval(), random.Random(0)
    assert module.origin.startswith("torch_geometric" if with_torch_geometric else "index_add")
    shapes: list[tuple[int, ...]] = []

    def served(*batch: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape[-1] for tensor in batch[1:]))
        return module(*batch)

    for _ in range(20):
        batch = irregular.draw_graphs(irregular.QUICK_GRAPHS, draw, CPU)
        torch.testing.assert_close(irregular.padding_graphs(served)(*batch), module(*batch))
        edges, nodes, bounds = shapes[-1]
        assert edges == irregular.quarter_step(batch[1].shape[1])
        assert nodes == irregular.quarter_step(len(batch[0]) + 1) > len(batch[0])
        assert bounds == irregular.quarter_step(len(batch[3])) + 1


def test_texts_that_are_padded_by_hand_give_the_same_loss_and_gradients():
    pytest.importorskip("transformers")
    settings = topics.Settings(CPU, quick=True)
    batches = irregular.draw_texts(irregular.QUICK_TEXTS, CPU)
    assert len({ids.shape for ids, _ in batches}) == len(batches)
    by_hand = dataclasses.replace(runners.EAGER, name="hand-padded")
    answers = []
    for way in (runners.EAGER, by_hand):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runners, "HAND_PADDED", by_hand)
            module = irregular.language_model(settings)
            step = irregular.FineTuning(module, module.state_dict(), way)
            answers.append(torch.stack([step(*batch) for batch in batches]))
    torch.testing.assert_close(*answers)
    assert answers[0].min() > 0


def test_every_topic_has_jobs_and_a_limit():
    for name in topics.NAMES:
        topic = topics.load(name)
        assert topic.JOBS
        assert topic.LIMIT_S > 0


def test_a_topic_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["nonsense", "--device", "cpu"])
    assert "'nonsense' is no topic" in capsys.readouterr().err


@pytest.mark.slow
def test_a_topic_on_the_host_driver():
    found = host_cost.run(host_cost.JOBS[0], topics.Settings(CPU, quick=True))
    assert {row.way for row in found} >= {"eager", "inductor", "hand-written", "sharedgraph", "raw replay"}
    assert not any(row.wrong for row in found)
    assert {row.note for row in found if row.way == "reduce-overhead"} == {"needs CUDA"}


@pytest.mark.slow
def test_the_steps_of_a_call_are_measured_on_the_host_driver():
    with torch.inference_mode():
        found = micro_call.measure(inputs=2, parameters=1, rounds=1, device=CPU)
    assert {"layer: Dynamo", "inductor", "sharedgraph", "outputs", "staging, graph launch"} <= set(found)
    assert all(row["p20"] <= row["median"] <= row["p80"] for row in found.values())
