"""The error rule, the covering cases and the poison can fail: each is shown a fault."""

import itertools

import pytest
import torch
from spies import guarded, poison
from support import Case, assert_close, build, pairwise, run_moe_mlp, run_reference


def rounded(dtype):
    ref = torch.randn(40, 30, dtype=torch.float64)
    return ref.to(dtype), ref


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_rule_takes_a_rounded_result_and_nothing_worse(dtype):
    eager, ref = rounded(dtype)
    assert_close(eager, eager, ref, dtype)
    nan = eager.clone()
    nan[3, 4] = torch.nan
    one_wrong = eager.clone()
    one_wrong[0, 0] += 2
    for wrong in (torch.zeros_like(eager), nan, one_wrong, eager * 1.01, eager.flip(0), -eager):
        with pytest.raises(AssertionError, match="out: "):
            assert_close(wrong, eager, ref, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exact_lanes_see_two_per_mille(dtype):
    eager, ref = rounded(dtype)
    with pytest.raises(AssertionError, match="out: "):
        assert_close(eager * 1.002, eager, ref, dtype)


def test_a_loop_too_bad_to_compare_with_is_refused():
    eager, ref = rounded(torch.bfloat16)
    with pytest.raises(AssertionError, match="lets all zeros"):
        assert_close(eager, torch.zeros_like(eager), ref, torch.bfloat16)


def test_shapes_must_agree():
    eager, ref = rounded(torch.float32)
    with pytest.raises(AssertionError):
        assert_close(eager[:1], eager, ref, torch.float32)


def test_zeros_are_right_only_where_the_truth_is_zero():
    zeros = torch.zeros(3, 4)
    assert_close(zeros, zeros, zeros.double(), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(zeros + 1e-30, zeros, zeros.double(), torch.float32)


def test_pairwise_covers_every_pair():
    factors = {"a": (1, 2, 3), "b": "xyzw", "c": (True, False), "d": range(5)}
    rows = pairwise(factors)
    for one, other in itertools.combinations(factors, 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(itertools.product(factors[one], factors[other]))
    assert 20 <= len(rows) <= 30
    assert rows == pairwise(factors)


def test_poison_fills_what_is_allocated():
    with poison():
        tensors = [torch.empty(3, 4), torch.empty_like(torch.zeros(4, 3).t()), torch.zeros(2).new_empty((5,))]
        integers = torch.empty(3, dtype=torch.int32)
    assert all(tensor.isnan().all() for tensor in tensors)
    assert tensors[1].stride() == (1, 3)
    assert integers.tolist() == [-7, -7, -7]


def test_poison_sees_a_write_beside_an_output():
    def write():
        with poison():
            torch.empty(3).as_strided((1,), (1,), 64 + 3).zero_()

    with pytest.raises(AssertionError, match="wrote beside"):
        write()


def test_what_lies_beside_an_input_is_nan():
    tensor = guarded(torch.ones(4))
    assert tensor.equal(torch.ones(4))
    assert tensor.as_strided((2,), (1,), 63).isnan().tolist() == [True, False]


def test_layouts_are_the_same_call():
    """Stored differently, the inputs mean the same: outputs and gradients agree with the contiguous ones."""
    inputs = build(Case())
    plain = run_moe_mlp(Case(), inputs)
    for layout in ("strided x", "column-major x", "transposed weights", "interleaved", "sliced weights"):
        other = run_moe_mlp(Case(layout=layout), inputs)
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
    assert plain.keys() == run_reference(Case(), inputs).keys()
