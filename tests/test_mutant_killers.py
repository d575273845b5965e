"""The fast subset that mutants.py runs: few cases that together reach every kernel, option and index map."""

import sys

import pytest
import torch
from spies import poison, use_interpreter
from support import Case, check_case
from test_lora import Adapted, check_adapted

from fastexperts.routing import route_torch

# The first ones are cheap and find most faults.
CASES = (
    Case(tokens=33, experts=4, dims=(48, 80)),
    Case(33, 7, 2, (97, 47), "sentinels", activation="gpt_oss clamped", dtype=torch.float64),
    Case(tokens=33, experts=4, dims=(48, 80), bias=True),
    Case(33, 4, 2, (48, 80), layout="transposed and interleaved", activation="gpt_oss clamped", bias=True),
    Case(tokens=33, experts=4, dims=(32, 16), layout="transposed weights", activation="swiglu capped"),
    Case(tokens=70, experts=2, dims=(32, 16), layout="column-major x", routing="zipf"),
    Case(tokens=150, experts=2, top_k=2, dims=(32, 48), activation="relu2", routing="duplicates"),
)


@pytest.mark.parametrize("tokens", [3, 300])
def test_routing(tokens, monkeypatch):
    use_interpreter(monkeypatch)
    from fastexperts import kernels

    monkeypatch.setattr(kernels.routing, "CHUNK", 4)  # a scan of several steps without 65,536 pairs
    ids = torch.randint(-1, 6, (tokens, 2))
    with poison(), kernels.launch.forgotten():
        got = kernels.route(ids, 5, 16).tensors
    expected = route_torch(ids, 5, 16).tensors
    live = 1 + int(expected[3][0, 0])
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(got[3][:live], expected[3][:live])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case, monkeypatch):
    use_interpreter(monkeypatch)
    monkeypatch.setenv("FASTEXPERTS_TMA", str(int(case.tma)))
    with poison():
        check_case(case)


def test_columns_in_several_blocks(monkeypatch):
    """As with more than 2,048 of them."""
    use_interpreter(monkeypatch)
    from fastexperts import kernels

    monkeypatch.setattr(sys.modules["fastexperts.kernels.combine"], "_BLOCK_D", 16)
    with poison(), kernels.launch.forgotten():
        check_case(Case(tokens=33, experts=4, dims=(48, 80)))


def test_kernels_with_updates(monkeypatch):
    use_interpreter(monkeypatch)
    with poison():
        check_adapted(Adapted(Case(tokens=33, experts=4, dims=(48, 80)), 5, 20, 0.5))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend(case, monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "torch")
    check_case(case)
