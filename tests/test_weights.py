"""Weight: every stored layout is one view of the same numbers, and never a copy."""

import pytest
import torch

from fastexperts import FastexpertsError, Weight
from fastexperts.weights import as_weight

E, F, D = 3, 5, 4


def stored(transposed):
    """(w, its E, F, D entries): a weight written element by element as the layout says."""
    w = torch.empty((E, D, F) if transposed else (E, F, D))
    entries = torch.randn(E, F, D)
    for e, f, d in torch.cartesian_prod(*(torch.arange(n) for n in entries.shape)).tolist():
        w[(e, d, f) if transposed else (e, f, d)] = entries[e, f, d]
    return w, entries


@pytest.mark.parametrize("transposed", [False, True])
def test_the_view_of_every_layout(transposed):
    w, entries = stored(transposed)
    view = Weight(w, transposed).out_in
    assert torch.equal(view, entries)
    assert view.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()


def test_the_gradient_comes_back_in_the_stored_layout():
    w, entries = stored(transposed=True)
    w.requires_grad_()
    (Weight(w, transposed=True).out_in * entries).sum().backward()
    assert torch.equal(w.grad, entries.transpose(1, 2))


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


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(E, D), rf"`bias` got \[{E}, {D}\]; it needs \[{E}, {F}\]"),
        (torch.zeros(E, F, dtype=torch.long), r"`bias` got torch.int64 on cpu; it needs one of"),
        (torch.zeros(E, F, device="meta"), r"`bias` got torch.float32 on meta; .* on cpu"),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_bias_of_another_weight_is_refused(bias, message, transposed):
    with pytest.raises(FastexpertsError, match=message):
        Weight(stored(transposed)[0], transposed, bias)
