"""Routing: its worked example, the invariant of each field, and the kernels against plain PyTorch."""

import dataclasses

import pytest
import torch
from spies import poison, use_interpreter
from support import ROUTINGS, expert_ids

from fastexperts import FastexpertsError, Routing
from fastexperts.routing import check_ids, route_torch, schedule_length

# Tokens, experts, top-k, block_m: P below, at and above one block of 256 pairs, and several blocks.
SIZES = ((1, 1, 1, 16), (5, 4, 2, 2), (128, 8, 2, 16), (100, 16, 3, 32), (86, 512, 6, 128), (700, 7, 2, 64))


def kernel_route(ids, experts, block_m):
    from fastexperts import kernels

    with poison():
        return kernels.route(ids, experts, block_m).tensors


def torch_route(ids, experts, block_m):
    return route_torch(ids, experts, block_m).tensors


IMPLEMENTATIONS = {"torch": torch_route, "kernels": kernel_route}


@pytest.fixture(params=IMPLEMENTATIONS)
def route(request, monkeypatch):
    if request.param == "kernels":
        use_interpreter(monkeypatch)
    return IMPLEMENTATIONS[request.param]


def ids_of(kind, tokens, experts, k):
    return expert_ids(kind, tokens, experts, min(k, experts), torch.Generator().manual_seed(0))


def test_worked_example(route):
    """The docstring's, number by number."""
    ids = torch.tensor([[2, 0], [0, 3], [2, 2]])
    row_of_pair, pair_of_row, offsets, schedule = (t.tolist() for t in route(ids, 3, 2))
    assert row_of_pair == [2, 0, 1, -1, 3, 4]
    assert pair_of_row == [1, 2, 0, 4, 5, -1]
    assert offsets == [0, 2, 2, 5]
    assert schedule[:4] == [[3, 2, 0], [0, 0, 2], [2, 2, 5], [2, 4, 5]]
    doc = Routing.__doc__
    assert all(str(values) in doc for values in (row_of_pair, pair_of_row, offsets))
    assert f"{str(schedule[:4])[:-1]}, ...]" in doc


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_invariants(kind, size, route):
    tokens, experts, k, block_m = size
    ids = ids_of(kind, tokens, experts, k)
    row_of_pair, pair_of_row, offsets, schedule = (t.tolist() for t in route(ids, experts, block_m))
    flat = ids.flatten().tolist()
    valid = [pair for pair, e in enumerate(flat) if 0 <= e < experts]

    assert [row >= 0 for row in row_of_pair] == [0 <= e < experts for e in flat]
    assert sorted(row_of_pair[pair] for pair in valid) == list(range(len(valid)))
    assert pair_of_row == sorted(valid, key=lambda pair: (flat[pair], pair)) + [-1] * (len(flat) - len(valid))
    assert all(pair_of_row[row_of_pair[pair]] == pair for pair in valid)
    assert offsets == [sum(flat[pair] < e for pair in valid) for e in range(experts + 1)]

    live, block, _ = schedule[0]
    assert block == block_m
    assert live + 1 <= len(schedule) == schedule_length(len(flat), experts, block_m)
    covered = []
    for expert, first, end in schedule[1 : 1 + live]:
        assert end == offsets[expert + 1]
        assert offsets[expert] <= first < offsets[expert + 1]
        covered += range(first, min(first + block_m, offsets[expert + 1]))
    assert covered == list(range(len(valid)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_equal_pytorch(size, dtype, monkeypatch):
    use_interpreter(monkeypatch)
    tokens, experts, k, block_m = size
    ids = ids_of("sentinels", tokens, experts, k).to(dtype)
    expected, got = torch_route(ids, experts, block_m), kernel_route(ids, experts, block_m)
    live = int(expected[3][0, 0])
    for name, a, b in zip(("row_of_pair", "pair_of_row", "offsets"), expected[:3], got[:3], strict=True):
        assert torch.equal(a, b), name
        assert b.dtype == torch.int32
    assert got[3].shape == expected[3].shape
    assert torch.equal(got[3][: 1 + live], expected[3][: 1 + live])


@pytest.mark.parametrize("experts", [1, 3, 512])
def test_no_tokens(experts, route):
    row_of_pair, pair_of_row, offsets, schedule = route(torch.empty(0, 2, dtype=torch.int64), experts, 16)
    assert row_of_pair.numel() == pair_of_row.numel() == 0
    assert offsets.tolist() == [0] * (experts + 1)
    assert schedule[0].tolist() == [0, 16, 0]


def test_ids_beyond_int32_take_no_row(route):
    """Corrupt ids are sentinels too, also those whose lower 32 bits are an expert."""
    ids = torch.tensor([[0, 2**31 - 1], [-(2**31), 1], [2**32, -(2**32) + 1]])
    row_of_pair, pair_of_row, offsets, _ = route(ids, 2, 16)
    assert row_of_pair.tolist() == [0, -1, -1, 1, -1, -1]
    assert pair_of_row.tolist() == [0, 3, -1, -1, -1, -1]
    assert offsets.tolist() == [0, 1, 2]


def test_ties_keep_the_order_of_pairs(route):
    ids = torch.ones(300, 2, dtype=torch.int64)
    row_of_pair, pair_of_row, _, _ = route(ids, 3, 16)
    assert row_of_pair.tolist() == pair_of_row.tolist() == list(range(600))


def test_order_of_the_fields():
    tensors = torch_route(torch.tensor([[0, 1], [1, 2], [0, 5]]), 4, 16)
    routing = Routing(*tensors, top_k=2)
    assert all(a is b for a, b in zip(routing.tensors, tensors, strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.top_k = 3


def test_what_does_not_fit_is_refused():
    row_of_pair, pair_of_row, offsets, schedule = torch_route(torch.tensor([[0, 1], [1, 2]]), 4, 16)
    with pytest.raises(FastexpertsError, match="need one shape"):
        Routing(row_of_pair, pair_of_row[:3], offsets, schedule, top_k=2)
    with pytest.raises(FastexpertsError, match="does not divide"):
        Routing(row_of_pair, pair_of_row, offsets, schedule, top_k=3)


@pytest.mark.parametrize("wrong", [-2, 5, 2**40])
def test_check_ids(wrong):
    check_ids(torch.tensor([[-1, 0], [3, 4]]), 4)
    with pytest.raises(FastexpertsError, match=f"the id {wrong}"):
        check_ids(torch.tensor([[0, wrong]]), 4)
