"""The demo as a user runs it, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cudagraph_backend.__main__ import main
from cudagraph_backend.demo import models, workload

pytestmark = pytest.mark.slow

# What a second run must repeat; times and the pool's scratch may differ.
COUNTED = ("regions", "graphs", "captures", "replays", "fallbacks", "rows_real", "rows_padded", "output_pool_bytes")


def run_demo(file: Path, *argv: str) -> dict[str, Any]:
    assert main(["demo", "--device", "cpu", "--json", str(file), *argv]) == 0
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def rows_that_vary(requests: int, seed: int = 0) -> list[int]:
    """The batch sizes without 1: a region of its own, which has no dim to pad."""
    return [rows for rows in workload.row_counts(requests, seed) if rows > 1]


def test_mlp_in_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = run_demo(tmp_path / "out.json", "--model", "mlp", "--requests", "20")
    printed = capsys.readouterr().out
    assert [way["name"] for way in data["ways"]] == ["eager", "inductor", "sharedgraph"]
    assert all(f"\n{way['name']} " in printed for way in data["ways"])
    assert data["max_abs_error"] <= 1e-4
    stats = data["stats"]
    assert stats["fallbacks"] == {}
    assert stats["rows_real"] == 2 * sum(rows_that_vary(20))  # two passes over the stream
    assert stats["rows_padded"] > 0
    assert 0 < stats["graphs"] == stats["captures"] < data["distinct_shapes"]
    # One row of ten floats per request row, at the largest bucket; the pool is not the sum of the buckets.
    assert 64 * 10 * 4 <= stats["output_pool_bytes"] - stats["staging_bytes"] < stats["sum_of_buckets_bytes"]


def test_a_second_run_in_a_new_process_gives_the_same(tmp_path: Path):
    """With Inductor's caches warm, too: the backend must still be ours, not Inductor's cached result alone."""
    runs = []
    for run in ("first", "second"):
        file = tmp_path / f"{run}.json"
        command = ["demo", "--model", "mlp", "--device", "cpu", "--requests", "12", "--ways", "sharedgraph"]
        subprocess.run([sys.executable, "-m", "cudagraph_backend", *command, "--json", str(file)], check=True)
        runs.append(json.loads(file.read_text(encoding="utf-8")))
    first, second = runs
    assert first["stats"]["replays"] > 0
    assert {key: first["stats"][key] for key in COUNTED} == {key: second["stats"][key] for key in COUNTED}
    assert first["max_abs_error"] == second["max_abs_error"]


def test_minilm_with_real_weights_and_sentences(tmp_path: Path):
    data = run_demo(tmp_path / "out.json", "--requests", "6", "--ways", "sharedgraph", "--seed", "1")
    assert data["max_abs_error"] <= 1e-4
    requests = workload.build("minilm", 6, 1, torch.device("cpu")).requests
    lengths = [ids.shape[1] for ids, _ in requests]  # padded as well, to buckets that they are already
    assert data["stats"]["rows_real"] == 2 * (sum(rows_that_vary(6, seed=1)) + sum(lengths))
    assert data["stats"]["rows_padded"] > 0
    assert data["stats"]["fallbacks"] == {}
    # The range is sized for the largest batch at once, whatever came so far.
    assert data["stats"]["output_pool_bytes"] >= workload.MAX_ROWS * 384 * 4


def test_llama_answers_with_the_logits_of_the_next_token(tmp_path: Path):
    data = run_demo(tmp_path / "out.json", "--model", "llama", "--requests", "5", "--ways", "sharedgraph")
    assert data["max_abs_error"] <= 1e-4
    assert data["stats"]["fallbacks"] == {}
    made = workload.build("llama", 5, 0, torch.device("cpu"))
    assert [ids.shape for (ids,) in made.requests] == [(n, workload.LLAMA_LENGTH) for n in workload.row_counts(5, 0)]
    with torch.inference_mode():
        logits = made.module(*made.requests[0])
        whole = made.module.llama(input_ids=made.requests[0][0]).logits
    torch.testing.assert_close(logits, whole[:, -1])
    assert logits.shape[1] == models.LLAMA_VOCABULARY


def test_the_encoder_is_the_one_that_sentence_transformers_runs():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentences = workload.read_sentences()[:5]
    encoder, tokenizer = models.load_minilm()
    coded = tokenizer(sentences, padding=True, pad_to_multiple_of=32, return_tensors="pt")
    with torch.inference_mode():
        embeddings = encoder(coded["input_ids"], coded["attention_mask"])
    theirs = sentence_transformers.SentenceTransformer(str(models.minilm_folder()), device="cpu")
    expected = theirs.encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


def test_related_sentences_lie_closer_than_unrelated_ones():
    """Real weights were loaded: random ones would know nothing of meaning."""
    encoder, tokenizer = models.load_minilm()
    texts = ["The soup needs more salt.", "Please add some salt to the soup.", "The train leaves at noon."]
    coded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        soup, salt, train = encoder(coded["input_ids"], coded["attention_mask"])
    assert soup @ salt > 0.8
    assert soup @ train < 0.3


def test_the_sentences_come_in_three_padded_lengths():
    _, tokenizer = models.load_minilm()
    groups = workload.group_by_length(workload.read_sentences(), tokenizer)
    assert set(groups) == set(workload.LENGTH_WEIGHTS)
