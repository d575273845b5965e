"""Weight: every stored layout is one view of the same numbers, and never a copy."""

import pytest
import torch

from fastexperts import FastexpertsError, Weight
from fastexperts.weights import as_weight

E, F, D = 3, 5, 4


def stored(transposed, interleaved):
    """(w, its C, F, D entry): a weight written element by element as the layout says."""
    w = torch.empty((E, D, 2 * F) if transposed else (E, 2 * F, D))
    parts = torch.randn(E, 2, F, D)
    for e, c, f, d in torch.cartesian_prod(*(torch.arange(n) for n in parts.shape)).tolist():
        row = 2 * f + c if interleaved else c * F + f
        w[(e, d, row) if transposed else (e, row, d)] = parts[e, c, f, d]
    return w, parts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_parts_of_every_layout(transposed, interleaved):
    w, parts = stored(transposed, interleaved)
    view = Weight(w, transposed, interleaved).parts(2)
    assert torch.equal(view, parts)
    assert view.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
def test_one_part_is_the_whole(transposed):
    w, parts = stored(transposed, False)
    weight = Weight(w, transposed)
    assert torch.equal(weight.parts(1), parts.flatten(1, 2)[:, None])
    assert torch.equal(weight.out_in, parts.flatten(1, 2))


def test_the_gradient_comes_back_in_the_stored_layout():
    w, parts = stored(transposed=True, interleaved=True)
    w.requires_grad_()
    Weight(w, transposed=True, interleaved=True).parts(2).square().sum().backward()
    assert torch.equal(w.grad, 2 * w)
    assert w.grad.shape == (E, D, 2 * F)
    assert torch.equal(w.grad.sum(), 2 * w.detach().sum())
    assert parts.shape == (E, 2, F, D)


def test_as_weight():
    w = torch.zeros(E, F, D)
    assert as_weight(w).w is w
    assert not as_weight(w).transposed
    weight = Weight(w, transposed=True)
    assert as_weight(weight) is weight


@pytest.mark.parametrize("shape", [(4,), (4, 4), (2, 3, 4, 5)])
def test_anything_but_three_dimensions_is_refused(shape):
    with pytest.raises(FastexpertsError, match=f"`w` got {len(shape)} dimensions.*needs 3 dimensions"):
        Weight(torch.zeros(shape))


def test_odd_rows_hold_no_gate_and_up():
    with pytest.raises(FastexpertsError, match=r"got 7 output rows .*a multiple of 2 .*transposed=True"):
        Weight(torch.zeros(2, 7, 4)).parts(2)
