"""The oracle itself: the formula written out for one token at a time, and the arguments it takes."""

import pytest
import torch
from support import ACTIVATION_ROWS, Case, build
from torch.nn import functional as nnf

from fastexperts import ACTIVATIONS, FastexpertsError, moe_mlp_reference


def test_the_formula_token_by_token():
    """SwiGLU with nothing of ours: ids outside [0, E) add nothing."""
    case = Case(tokens=7, experts=4, top_k=2, routing="sentinels", dtype=torch.float64)
    inputs = build(case)
    expected = torch.zeros_like(inputs.x)
    for t, k in torch.cartesian_prod(*map(torch.arange, inputs.ids.shape)).tolist():
        e = int(inputs.ids[t, k])
        if 0 <= e < case.experts:
            gate, up = (inputs.w1[e] @ inputs.x[t]).chunk(2)
            expected[t] += inputs.weight[t, k] * (inputs.w2[e] @ (nnf.silu(gate) * up))
    assert (inputs.ids >= case.experts).any(), "no sentinel: nothing would be left out"
    got = moe_mlp_reference(inputs.x, inputs.ids, inputs.weight, inputs.w1, inputs.w2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(name):
    case = Case(tokens=5, activation=name)
    assert case.act == ACTIVATION_ROWS[name] == ACTIVATIONS[name]
    inputs = build(case)
    arguments = inputs.x, inputs.ids, inputs.weight, inputs.w1, inputs.w2
    by_name = moe_mlp_reference(*arguments, activation=name)
    assert torch.equal(by_name, moe_mlp_reference(*arguments, activation=ACTIVATIONS[name]))
    with pytest.raises(FastexpertsError, match="moe_mlp_reference: `activation` got 'swish'"):
        moe_mlp_reference(*arguments, activation="swish")
