"""The request stream: seeded, within its bounds, marked as dynamic."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_backend.demo import workload
from cudagraph_backend.demo.workload import ChangingDim, Workload

CPU = torch.device("cpu")


def words(sentences: list[str]) -> dict[str, list[list[int]]]:
    """A tokenizer of one token per word, between a first and a last token."""
    return {"input_ids": [[0] * (len(sentence.split()) + 2) for sentence in sentences]}


def test_row_counts_repeat_with_the_seed_and_reach_both_bounds():
    rows = workload.row_counts(2000, seed=3)
    assert rows == workload.row_counts(2000, seed=3)
    assert rows != workload.row_counts(2000, seed=4)
    assert (min(rows), max(rows)) == (1, workload.MAX_ROWS)


def test_small_batches_are_as_common_as_large_ones():
    rows = workload.row_counts(5000, seed=0)
    assert sum(n < 8 for n in rows) / 5000 == pytest.approx(0.5, abs=0.03)


def test_a_shorter_stream_is_the_start_of_a_longer_one():
    assert workload.row_counts(5, seed=0) == workload.row_counts(50, seed=0)[:5]


def test_the_sentences_are_many_and_distinct():
    sentences = workload.read_sentences()
    assert 150 <= len(set(sentences)) == len(sentences)
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)
    assert max(len(sentence.split()) for sentence in sentences) <= 96 - 2


@pytest.mark.parametrize(("tokens", "length"), [(1, 32), (32, 32), (33, 64), (96, 96), (97, 128)])
def test_padded_length_is_the_next_multiple_of_32(tokens: int, length: int):
    assert workload.padded_length(tokens) == length


def test_sentences_are_grouped_by_their_own_padded_length():
    short, long = "a b c", " ".join("w" * 40)
    assert workload.group_by_length([short, long], words) == {32: [short], 64: [long]}


@given(rows=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_a_request_is_as_long_as_the_kind_that_was_drawn(rows: int, seed: int):
    by_length = {32: ["a", "b"], 64: ["c"], 96: ["d"]}
    drawn = workload.draw_sentences(by_length, rows, random.Random(seed))
    assert len(drawn) == rows
    longest = random.Random(seed).choices(list(workload.LENGTH_WEIGHTS), list(workload.LENGTH_WEIGHTS.values()))[0]
    assert max(length for length, kind in by_length.items() if set(kind) & set(drawn)) == longest


def test_every_length_is_drawn_about_as_often_as_its_weight():
    by_length = {length: [str(length)] for length in workload.LENGTH_WEIGHTS}
    draw = random.Random(0)
    longest = Counter(max(map(int, workload.draw_sentences(by_length, 8, draw))) for _ in range(2000))
    for length, weight in workload.LENGTH_WEIGHTS.items():
        assert longest[length] / 2000 == pytest.approx(weight, abs=0.04)


def test_lengths_that_no_sentence_has_are_never_drawn():
    draw = random.Random(0)
    assert set(workload.draw_sentences({32: ["a"], 64: []}, 20, draw)) == {"a"}


def test_equal_arguments_give_equal_requests_and_weights():
    one, two = (workload.build("mlp", 6, seed=1, device=CPU) for _ in range(2))
    assert [batch[0].shape[0] for batch in one.requests] == workload.row_counts(6, seed=1)
    for mine, other in zip(one.requests, two.requests, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    torch.testing.assert_close(one.module.state_dict(), two.module.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one.requests[0][0][:1], workload.build("mlp", 6, seed=2, device=CPU).requests[0][0][:1])


def test_distinct_shapes_counts_each_shape_once():
    batches = tuple((torch.empty(rows, 4), torch.empty(rows, 2)) for rows in (3, 5, 3))
    assert Workload("mlp", "rows", torch.nn.Identity(), batches).distinct_shapes == 2


def test_a_single_row_is_not_marked_dynamic():
    one, many = torch.empty(1, 32), torch.empty(7, 32)
    dims = (ChangingDim(0, 2, 64), ChangingDim(1, 32, 96))
    workload.mark((one,), dims)
    workload.mark((many,), dims)
    assert (one._dynamo_dynamic_indices, many._dynamo_dynamic_indices) == ({1}, {0, 1})
