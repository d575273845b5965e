"""Low-rank updates of frozen experts on a GPU, at the shape of a real model: error rule, graphs, determinism.

A rank compiles its own kernels, the most of this file's time: few ranks a dtype, all small cases at rank 16.
"""

import sys
from dataclasses import dataclass

import pytest
import torch
from spies import spy_backend, spy_operands
from support import ROOT, Error
from support_gpu import Inputs, Loop, build, shapes
from test_gpu import exact_fp32, expected_path
from torch import Tensor

from fastexperts import Weight, moe_mlp, moe_mlp_reference
from fastexperts.weights import Lora

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures(exact_fp32.__name__)]

QWEN3 = shapes.SHAPES["qwen3-30b"]
SMALL = shapes.Shape("small", 512, 256, 12, 8)  # experts are not as many as any rank here
FACTORS = ("a1", "b1", "a2", "b2")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RING_PLANS = 4  # the row-tiled products


@dataclass(frozen=True)
class Adapted:
    """Frozen experts of `inputs`, and by name the factors of the updates that there are."""

    inputs: Inputs
    factors: dict[str, Tensor]
    scale: float = 0.5

    @property
    def names(self) -> tuple[str, ...]:
        return "out", "dx", "dweight", *("d" + name for name in self.factors)


def adapt(inputs: Inputs, r1: int, r2: int, dtype: torch.dtype | None = None) -> Adapted:
    """Factors under which x a^T and the update's outputs are about N(0, 1); a rank of 0 is no update."""
    generator = torch.Generator(inputs.x.device).manual_seed(5)
    (experts, g, d), f = inputs.w1.shape, inputs.w2.shape[2]
    factors = {}
    for name, dims, fan in (
        ("a1", (experts, r1, d), d),
        ("b1", (experts, g, r1), r1),
        ("a2", (experts, r2, f), f),
        ("b2", (experts, d, r2), r2),
    ):
        if 0 not in dims:
            drawn = torch.randn(*dims, generator=generator, device=inputs.x.device)
            factors[name] = drawn.mul_(fan**-0.5).to(dtype or inputs.w1.dtype)
    return Adapted(inputs, factors)


def layer(function, adapted: Adapted, x, weight, w1, w2, *factors, ids=None) -> Tensor:
    named = dict(zip(adapted.factors, factors, strict=True))
    lora1 = Lora(named["a1"], named["b1"], adapted.scale) if "a1" in named else None
    lora2 = Lora(named["a2"], named["b2"], adapted.scale) if "a2" in named else None
    ids = adapted.inputs.ids if ids is None else ids
    return function(x, ids, weight, Weight(w1, lora=lora1), Weight(w2, lora=lora2))


def ours(adapted: Adapted, call=layer) -> dict[str, Tensor]:
    inputs = adapted.inputs
    x, weight, *factors = leaves = [
        leaf.detach().requires_grad_() for leaf in (inputs.x, inputs.weight, *adapted.factors.values())
    ]
    out = call(moe_mlp, adapted, x, weight, inputs.w1, inputs.w2, *factors)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    return dict(zip(adapted.names, (out.detach(), *grads), strict=True))


class FoldingLoop(Loop):
    """As `Loop`, on folded weights."""

    def __init__(self, adapted: Adapted, dtype: torch.dtype | None) -> None:
        super().__init__(adapted.inputs, dtype)
        self.adapted = adapted

    def expert(self, e: int) -> list[Tensor]:
        """Gradients of the factors of expert `e`."""
        w1, w2 = (self._leaf(w[e : e + 1]).detach() for w in (self.inputs.w1, self.inputs.w2))
        factors = [self._leaf(factor[e : e + 1]) for factor in self.adapted.factors.values()]
        ids = torch.where(self.inputs.ids == e, 0, -1)
        out = layer(moe_mlp_reference, self.adapted, self.x, self.weight, w1, w2, *factors, ids=ids)
        out.backward(self.inputs.dout.to(out.dtype))
        self.out = self.out.detach() + out.detach()
        return [factor.grad for factor in factors]


def check(adapted: Adapted, out: dict[str, Tensor], dtype: torch.dtype, *, autocast: bool = False) -> None:
    """Every tensor of `out` by the rule of numerics.md."""
    eager, ref = FoldingLoop(adapted, None), FoldingLoop(adapted, torch.float64)
    assert tuple(out) == adapted.names
    errors = {name: Error(name, dtype) for name in adapted.names}
    for e in range(adapted.inputs.w1.shape[0]):
        with torch.autocast(adapted.inputs.x.device.type, dtype=dtype, enabled=autocast):
            of_eager = eager.expert(e)
        for name, *pair in zip(adapted.factors, of_eager, ref.expert(e), strict=True):
            errors["d" + name].add(out["d" + name][e : e + 1], *pair)
    errors["out"].add(out["out"], eager.out, ref.out)
    errors["dx"].add(out["dx"], eager.x.grad, ref.x.grad)
    errors["dweight"].add(out["dweight"], eager.weight.grad, ref.weight.grad)
    for error in errors.values():
        error.check()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("dtype", "rank", "tokens", "kind", "factors"),
    [
        (BF16, 16, 4096, "balanced", FP32),
        (BF16, 1, 1000, "skewed", None),
        (BF16, 40, 4096, "skewed", None),
        (BF16, 128, 1000, "balanced", FP32),
        (FP16, 16, 1000, "skewed", FP32),
        (FP32, 16, 1000, "balanced", None),
    ],
    ids=str,
)
def test_real_shapes(dtype, rank, tokens, kind, factors):
    adapted = adapt(build(QWEN3, tokens, kind, dtype), rank, rank, factors)
    with spy_operands() as operands, spy_backend() as calls:
        out = ours(adapted)
    assert {backend for backend, *_ in calls} == {"kernels"}
    if expected_path(dtype) == "ring":
        assert operands.count(("all", "ring")) == RING_PLANS
    else:
        assert expected_path(dtype) in {path for _, path in operands}
    assert {out["d" + name].dtype for name in FACTORS} == {factors or dtype}
    check(adapted, out, dtype)


def test_without_tensor_descriptors(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    adapted = adapt(build(QWEN3, 1000, "skewed"), 40, 40)
    with spy_operands() as operands:
        out = ours(adapted)
    assert {path for _, path in operands} == {"pointer"}
    check(adapted, out, BF16)


@pytest.mark.parametrize(("r1", "r2"), [(16, 0), (0, 16), (16, 3)])
def test_projections_alone_experts_without_rows_and_sentinels(r1, r2):
    inputs = build(SMALL, 777, "skewed")
    ids = torch.where(inputs.ids == 4, -1, inputs.ids).masked_fill(inputs.ids == 7, SMALL.experts)
    inputs.ids.copy_(ids)
    adapted = adapt(inputs, r1, r2)
    out = ours(adapted)
    check(adapted, out, BF16)
    for name in adapted.factors:
        grad = out["d" + name]
        assert grad[[4, 7]].count_nonzero() == 0, name
        assert all(grad[e].count_nonzero() for e in range(SMALL.experts) if e not in (4, 7)), name


def test_no_pair_has_an_expert():
    adapted = adapt(build(SMALL, 300), 16, 16)
    adapted.inputs.ids.fill_(-1)
    assert all(value.count_nonzero() == 0 for value in ours(adapted).values())


def test_an_update_of_zeros_changes_nothing():
    """lora_B as PEFT makes it: bitwise the frozen layer."""
    inputs = build(SMALL, 300)
    adapted = adapt(inputs, 16, 16)
    for name in ("b1", "b2"):
        adapted.factors[name].zero_()
    out = ours(adapted)
    x = inputs.x.detach().requires_grad_()
    assert torch.equal(out["out"], moe_mlp(x, inputs.ids, inputs.weight, inputs.w1, inputs.w2))
    assert out["db1"].count_nonzero() > 0
    assert out["da1"].count_nonzero() == 0


def test_fp32_weights_under_autocast():
    adapted = adapt(build(SMALL, 777, "balanced", FP32), 16, 16)
    with torch.autocast("cuda", dtype=BF16):
        out = ours(adapted)
    assert {tensor.dtype for tensor in out.values()} == {FP32}
    check(adapted, out, BF16, autocast=True)


def test_no_host_synchronisation():
    adapted = adapt(build(QWEN3, 1000), 16, 16, FP32)
    warm = ours(adapted)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = ours(adapted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(out, warm)


def test_twenty_runs_are_bitwise_equal():
    adapted = adapt(build(QWEN3, 4096, "skewed"), 16, 16, FP32)
    first = ours(adapted)
    assert all(equal(ours(adapted), first) for _ in range(19))


def test_a_cuda_graph_replays_any_routing():
    adapted = adapt(build(SMALL, 300), 16, 16)
    ours(adapted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(adapted)
    for seed, kind in enumerate(("skewed", "balanced"), start=1):
        ids, weight = shapes.routing(SMALL, 300, kind, "cuda", seed)
        adapted.inputs.ids.copy_(ids)
        adapted.inputs.weight.copy_(weight)
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in captured.items()}
        assert equal(replayed, ours(adapted))
    check(adapted, replayed, BF16)


def test_compiled_whole_by_inductor():
    torch._dynamo.reset()
    adapted = adapt(build(SMALL, 200), 16, 16)

    @torch.compile(fullgraph=True)
    def compiled(x, ids, weight, w1, w2, a1, b1, a2, b2):
        lora1, lora2 = Lora(a1, b1, adapted.scale), Lora(a2, b2, adapted.scale)
        return moe_mlp(x, ids, weight, Weight(w1, lora=lora1), Weight(w2, lora=lora2))

    def call(_, adapted, x, *others):
        return compiled(x, adapted.inputs.ids, *others)

    with spy_backend() as calls:
        out = ours(adapted, call)
    assert {backend for backend, *_ in calls} == {"kernels"}
    assert equal(out, ours(adapted))


def test_nothing_of_full_size_is_kept_but_h():
    """Between the passes: h, two tensors of rank columns, the routing; no folded weight."""
    inputs = build(QWEN3, 1000)
    adapted = adapt(inputs, 16, 16, FP32)
    ours(adapted)
    torch.cuda.empty_cache()
    x, weight, *factors = (
        leaf.detach().requires_grad_() for leaf in (inputs.x, inputs.weight, *adapted.factors.values())
    )
    before = torch.cuda.memory_allocated()
    out = layer(moe_mlp, adapted, x, weight, inputs.w1, inputs.w2, *factors)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    rows = 1000 * QWEN3.top_k
    least = rows * (2 * QWEN3.dim_f + 2 * 16) * 2
    assert least <= kept <= least + 2**22


@pytest.mark.parametrize("rank", [16, 3])
def test_through_peft(rank):
    """Factors in PEFT's own layout, in fp32; no fold."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import adapters
    import lora
    import problems

    import fastexperts

    fastexperts.register()
    experts = problems.make_experts(SMALL, BF16)
    adapted = adapters.Adapted.make(problems.Problem.make(SMALL, 777, "skewed", experts), rank)
    contestant = adapters.Contestant("fastexperts", adapted)
    for got, wanted in zip(contestant.results(), adapters.loop_fp64(adapted), strict=True):
        assert problems.relative(got, wanted) < 0.012
    assert lora.folds(contestant) == 0
    assert lora.folds(adapters.Contestant("peft", adapted)) > 0
