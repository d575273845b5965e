"""moe_mlp against the fp64 loop over every pair of shapes, routings, layouts, gates and frozen inputs."""

import pytest
import torch
from spies import poison, spy_backend, spy_operands, use_interpreter
from support import ACTIVATION_ROWS, FROZEN, LAYOUTS, ROUTINGS, Case, check_case, pairwise

FACTORS = {
    "experts": (1, 4, 7, 16),
    "top_k": (1, 2, 0),
    "dims": ((32, 16), (48, 80), (97, 47)),
    "routing": ROUTINGS,
    "layout": LAYOUTS,
    "activation": tuple(ACTIVATION_ROWS),
    "frozen": tuple(FROZEN),
    "dtype": (torch.float32, torch.float64),
    "tma": (True, False),
    "bias": (False, True),
}
# Two coverings: in one over all token counts, half of the pairs would meet where there is nothing to compute.
TOKENS = ((7, 33, 129), (0, 1, 2))
CASES = [Case(**row) for tokens in TOKENS for row in pairwise({"tokens": tokens, **FACTORS})]
FAST_ROWS = 300
HALF = [
    Case(tokens=7, dtype=torch.float16),
    Case(tokens=33, dtype=torch.float16, routing="sentinels", activation="gpt_oss clamped"),
    Case(tokens=33, dtype=torch.float16, dims=(97, 47), routing="zipf", layout="transposed weights"),
    Case(tokens=33, dtype=torch.float16, activation="relu2", tma=False, bias=True),
    Case(
        tokens=33, dtype=torch.float16, activation="gpt_oss", layout="transposed and interleaved", bias=True
    ),
    Case(tokens=33, dtype=torch.float16, routing="duplicates", layout="stride-0 gradient", frozen="weight"),
]


def param(case: Case):
    slow = (pytest.mark.slow,) if case.tokens * case.k > FAST_ROWS else ()
    return pytest.param(case, marks=slow, id=str(case))


def check_operands(case: Case, operands: list[tuple[str, str]]) -> None:
    """Each took a descriptor where its strides allow one and none was forbidden, and a pointer elsewhere."""
    aligned = all(dim * case.dtype.itemsize % 16 == 0 for dim in case.dims)
    rows = "descriptor" if case.tma and aligned else "pointer"
    expected = {("rows", rows), ("weight", rows)}
    also = set()
    if case.tma and case.dtype == torch.float64:
        also = {("rows", "descriptor")}  # the 2 * 47 columns of h
    if case.layout == "transposed weights":
        also.add(("weight", "pointer"))  # gate and up of a block lie apart
    if case.layout.startswith("transposed") and case.tma:
        also.add(("weight", "descriptor"))  # rows of 2 * 47
    assert expected <= set(operands) <= expected | also


def expected_ops(case: Case) -> list[str]:
    """What a forward and its backward run, in order: no more than the gradients that were asked for need."""
    asked = set(case.asked)
    forward = ["route", "up", "down", "combine"]
    if not asked:
        return forward
    return [
        *forward,
        *(["dh"] if asked - {"b2"} else []),
        *(["dw"] if "w2" in asked else []),
        *(["db"] if "b2" in asked else []),
        *(["dx", "combine"] if "x" in asked else []),
        *(["dw"] if "w1" in asked else []),
        *(["db"] if "b1" in asked else []),
    ]


def test_there_are_enough_cases():
    fast = [case for case in CASES if case.tokens * case.k <= FAST_ROWS]
    assert len(set(CASES)) == len(CASES) >= 240
    assert len([case for case in fast if case.tokens >= 7]) >= 110


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_kernels(case, monkeypatch):
    use_interpreter(monkeypatch)
    monkeypatch.setenv("FASTEXPERTS_TMA", str(int(case.tma)))
    with spy_backend() as calls, spy_operands() as operands, poison():
        check_case(case)
    assert [call[:2] for call in calls] == [("kernels", name) for name in expected_ops(case)]
    if case.tokens > 0:
        check_operands(case, operands)


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_torch_backend(case):
    with spy_backend() as calls:
        check_case(case)
    assert [call[:2] for call in calls] == [("cpu", name) for name in expected_ops(case)]


@pytest.mark.parametrize("case", HALF, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fp16(case, backend, monkeypatch):
    if backend == "triton":
        use_interpreter(monkeypatch)
    monkeypatch.setenv("FASTEXPERTS_TMA", str(int(case.tma)))
    with spy_backend() as calls:
        check_case(case)
    assert len(calls) == len(expected_ops(case))
