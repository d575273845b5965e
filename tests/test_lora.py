"""Low-rank updates of the experts: output and every gradient against the folded weight in fp64."""

from dataclasses import dataclass, replace

import pytest
import torch
from spies import poison, use_interpreter
from support import Case, Error, build, in_turn

from fastexperts import FastexpertsError, Weight, moe_mlp, moe_mlp_reference
from fastexperts.activations import SWIGLU
from fastexperts.weights import Lora

NAMES = ("x", "weight", "a1", "b1", "a2", "b2")


@dataclass(frozen=True)
class Adapted:
    """A layer with frozen experts and updates of rank `r`; a rank of 0 leaves a projection alone."""

    case: Case
    r1: int = 16
    r2: int = 16
    scale: float = 2.0
    factors: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.case}-r{self.r1},{self.r2}-{self.scale}-{self.factors}"

    def tensors(self, dtype=None):
        """{name: leaf} in `dtype`, by default as the case says."""
        inputs = build(self.case)
        generator = torch.Generator().manual_seed(7)
        d, f = self.case.dims
        e, parts = self.case.experts, self.case.act.parts
        made = {"x": inputs.x, "weight": inputs.weight}
        for name, shape, fan in (
            ("a1", (e, self.r1, d), d),
            ("b1", (e, parts * f, self.r1), self.r1),
            ("a2", (e, self.r2, f), f),
            ("b2", (e, d, self.r2), self.r2),
        ):
            if 0 not in shape:
                factor = torch.randn(*shape, generator=generator, dtype=torch.float64) / fan**0.5
                made[name] = factor.to(self.factors or self.case.dtype)
        leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in made.items()}
        return inputs, leaves

    def run(self, function, dtype=None):
        inputs, leaves = self.tensors(dtype)
        w1, w2, dout = (t.to(dtype or t.dtype) for t in (inputs.w1, inputs.w2, inputs.dout))
        lora1 = Lora(leaves["a1"], leaves["b1"], self.scale) if self.r1 else None
        lora2 = Lora(leaves["a2"], leaves["b2"], self.scale) if self.r2 else None
        out = function(
            leaves["x"], inputs.ids, leaves["weight"], Weight(w1, lora=lora1), Weight(w2, lora=lora2),
            activation=self.case.act,
        )  # fmt: skip
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


F32, F64, F16 = torch.float32, torch.float64, torch.float16
CASES = [
    Adapted(Case(tokens=33, experts=4, dims=(48, 80)), 16, 16),
    Adapted(Case(tokens=33, experts=7, dims=(97, 47), routing="sentinels", dtype=F64), 3, 5),
    Adapted(Case(tokens=70, experts=5, dims=(48, 80), routing="one empty", dtype=F64), 16, 16, 0.3),
    Adapted(Case(tokens=33, experts=4, dims=(48, 80), activation="gpt_oss"), 8, 0),
    Adapted(Case(tokens=33, experts=4, dims=(48, 80), activation="relu2"), 0, 8, 1.5),
    Adapted(Case(tokens=33, experts=3, dims=(32, 16), tma=False), 24, 100),
    Adapted(Case(tokens=40, experts=2, dims=(32, 16), routing="duplicates", dtype=F64), 128, 1),
    Adapted(Case(tokens=33, experts=4, dims=(48, 80), routing="last only"), 5, 16),
    Adapted(Case(tokens=129, experts=16, top_k=1, dims=(32, 16)), 4, 4),
    Adapted(Case(tokens=33, experts=4, dims=(48, 80), dtype=F16), 16, 16, 2.0, F32),
    Adapted(Case(tokens=33, experts=4, dims=(48, 80), dtype=F16), 7, 9, 0.5),
    Adapted(Case(tokens=33, experts=3, dims=(48, 80), routing="one empty"), 32, 130),
    Adapted(Case(tokens=33, experts=3, dims=(48, 300), routing="sentinels", dtype=F16), 129, 17, 0.5, F32),
    Adapted(Case(tokens=1, experts=4, dims=(48, 80), routing="all sentinels"), 4, 4),
    Adapted(Case(tokens=0, experts=4, dims=(48, 80)), 4, 4),
]


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    if request.param == "triton":
        use_interpreter(monkeypatch)
    else:
        monkeypatch.setenv("FASTEXPERTS_BACKEND", "torch")
    return request.param


@pytest.mark.parametrize("adapted", CASES, ids=str)
def test_output_and_every_gradient(adapted, backend, monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_TMA", str(int(adapted.case.tma)))
    with poison():
        check_adapted(adapted)


def check_adapted(adapted):
    """Raise unless output and every gradient hold to the error rule."""
    got = adapted.run(moe_mlp)
    eager, ref = adapted.run(moe_mlp_reference), adapted.run(moe_mlp_reference, F64)
    assert got.keys() == ref.keys()
    for name, value in got.items():
        assert value.dtype == eager[name].dtype
        error = Error(name, adapted.case.dtype)
        error.add(value, eager[name], ref[name])
        error.check()


W = torch.zeros(4, 6, 8)  # [E, out, in]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((3, 2, 8), (3, 6, 2), r"`lora.a` got \[3, 2, 8\]; it needs \[4, 2, 8\]"),
        ((4, 2, 6), (4, 6, 2), r"`lora.a` got \[4, 2, 6\]; it needs \[4, 2, 8\]"),
        ((4, 2, 8), (4, 8, 2), r"`lora.b` got \[4, 8, 2\]; it needs \[4, 6, 2\]"),
        ((4, 0, 8), (4, 6, 0), "r >= 1"),
    ],
)
def test_an_update_of_another_weight_is_refused(a, b, message):
    with pytest.raises(FastexpertsError, match=message):
        Weight(W, lora=Lora(torch.zeros(a), torch.zeros(b)))


def test_factors_that_do_not_fit_each_other_are_refused():
    with pytest.raises(FastexpertsError, match="the experts and the rank of a"):
        Lora(torch.zeros(4, 2, 8), torch.zeros(4, 6, 3))
    with pytest.raises(FastexpertsError, match=r"`a` got \[8, 8\]; it needs a tensor \[experts"):
        Lora(torch.zeros(8, 8), torch.zeros(4, 6, 2))
    with pytest.raises(FastexpertsError, match=r"on meta; it needs one of .* on cpu, as w"):
        Weight(W, lora=Lora(torch.zeros(4, 2, 8, device="meta"), torch.zeros(4, 6, 2)))


def test_what_is_no_update_is_refused():
    a, b = torch.zeros(4, 2, 8), torch.zeros(4, 6, 2)
    with pytest.raises(FastexpertsError, match="`scale` got Tensor; it needs a number: it gets no gradient"):
        Lora(a, b, torch.ones((), requires_grad=True))
    with pytest.raises(FastexpertsError, match="`lora` got tuple; it needs a fastexperts"):
        Weight(W, lora=(a, b))
    with pytest.raises(FastexpertsError, match="`bias` got list"):
        Weight(W, bias=[1.0])
    with pytest.raises(FastexpertsError, match=r"`lora\.a` got torch\.float8_e4m3fn"):
        Weight(W, lora=Lora(a.to(torch.float8_e4m3fn), b))


def test_each_factor_has_its_own_dtype_and_no_gradient_is_rounded_to_anothers():
    case = Case(tokens=33, experts=4, dims=(48, 80), dtype=torch.float32)
    inputs, generator = build(case), torch.Generator().manual_seed(1)

    def factors(dtype):
        sizes = ((4, 3, 48), (4, 160, 3), (4, 3, 80), (4, 48, 3))
        made = [torch.randn(size, generator=generator) * 0.1 for size in sizes]
        return [made[0].to(dtype).float().to(dtype), *made[1:]]

    def gradients(leaves):
        a1, b1, a2, b2 = [leaf.clone().requires_grad_() for leaf in leaves]
        w1, w2 = Weight(inputs.w1, lora=Lora(a1, b1)), Weight(inputs.w2, lora=Lora(a2, b2))
        out = moe_mlp(inputs.x, inputs.ids, inputs.weight, w1, w2)
        return torch.autograd.grad(out, [a1, b1, a2, b2], inputs.dout)

    mixed = factors(torch.bfloat16)
    found, expected = gradients(mixed), gradients([factor.float() for factor in mixed])
    assert [grad.dtype for grad in found] == [torch.bfloat16] + 3 * [torch.float32]
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(got, wanted)


def test_of_a_transposed_and_interleaved_weight(backend):
    """Rows of b are the stored outputs: gate and up in turn."""
    case = Case(tokens=33, experts=4, dims=(48, 80))
    adapted = Adapted(case, 5, 7)
    inputs, leaves = adapted.tensors()
    lora1 = Lora(leaves["a1"], leaves["b1"], 2.0)
    lora2 = Lora(leaves["a2"], leaves["b2"], 2.0)
    wanted = moe_mlp_reference(
        leaves["x"],
        inputs.ids,
        leaves["weight"],
        Weight(inputs.w1, lora=lora1),
        Weight(inputs.w2, lora=lora2),
    )
    turned1 = Lora(leaves["a1"], in_turn(leaves["b1"]), 2.0)
    w1 = Weight(in_turn(inputs.w1).mT.contiguous(), transposed=True, lora=turned1)
    w2 = Weight(inputs.w2.mT.contiguous(), transposed=True, lora=lora2)
    got = moe_mlp(
        leaves["x"], inputs.ids, leaves["weight"], w1, w2, activation=replace(SWIGLU, interleaved=True)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    names = list(leaves)
    for name, one, other in zip(
        names,
        torch.autograd.grad(got, list(leaves.values()), inputs.dout),
        torch.autograd.grad(wanted, list(leaves.values()), inputs.dout),
        strict=True,
    ):
        assert (one - other).norm() <= 1e-5 * other.norm(), name
