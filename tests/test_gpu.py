"""The Triton kernels on a GPU at the shapes of real models: error rule, graphs, determinism."""

from dataclasses import replace

import pytest
import torch
from spies import spy_backend, spy_operands
from support_gpu import Inputs, build, check, equal, ours, shapes

from fastexperts import ACTIVATIONS, moe_mlp

pytestmark = pytest.mark.gpu

FAMILIES = ("qwen3-30b", "deepseek-v3-e32", "ernie4.5-21b", "glm4.5-air", "dots1")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUTED = ((4096, "balanced"), (1000, "skewed"))
SMALL = shapes.Shape("small", 512, 256, 16, 4)
NAMES = ("out", "dx", "dweight", "dw1", "dw2")


@pytest.fixture(autouse=True)
def exact_fp32():
    """The eager loop is what it says: no TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "kind"), ROUTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_real_shapes(family, tokens, kind, dtype):
    inputs = build(shapes.SHAPES[family], tokens, kind, dtype)
    with spy_operands() as operands, spy_backend() as calls:
        out = ours(inputs)
    assert {backend for backend, *_ in calls} == {"kernels"}
    assert {path for _, path in operands} == {expected_path(dtype)}
    assert [out[name].dtype for name in NAMES] == [dtype, dtype, torch.float32, dtype, dtype]
    check(inputs, out, dtype)


def expected_path(dtype: torch.dtype) -> str:
    """How aligned operands reach the products on this GPU."""
    major = torch.cuda.get_device_capability()[0]
    if major == 9 and dtype.itemsize == 2:
        return "ring"
    return "descriptor" if major >= 9 else "pointer"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_tensor_descriptors(dtype, monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    inputs = build(shapes.SHAPES["qwen3-30b"], 1000, "skewed", dtype)
    with spy_operands() as operands:
        out = ours(inputs)
    assert {path for _, path in operands} == {"pointer"}
    check(inputs, out, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_dims_that_are_no_multiple_of_a_block(activation, dtype):
    """Rows, columns and contractions that end within a block, one expert without rows, sentinels."""
    inputs = build(shapes.Shape("tails", 336, 200, 6, 3), 777, "skewed", dtype)
    ids = torch.where(inputs.ids == 4, -1, inputs.ids)
    w1 = inputs.w1 if ACTIVATIONS[activation].gated else inputs.w1[:, :200].contiguous()
    inputs = replace(inputs, ids=ids, w1=w1, activation=activation)
    with spy_operands() as operands:
        out = ours(inputs)
    assert {path for _, path in operands} == {expected_path(dtype)}
    check(inputs, out, dtype)


@pytest.mark.parametrize("asked", [("x",), ("weight",), ("w1",), ("w2",), ("x", "w2"), ("weight", "w1")])
def test_what_is_frozen_changes_nothing_else(asked):
    inputs = build(SMALL, 1000, "skewed")
    whole = ours(inputs)
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    for name in asked:
        leaves[name].requires_grad_()
    out = moe_mlp(leaves["x"], inputs.ids, leaves["weight"], leaves["w1"], leaves["w2"])
    assert torch.equal(out, whole["out"])
    for name, grad in zip(
        asked, torch.autograd.grad(out, [leaves[n] for n in asked], inputs.dout), strict=True
    ):
        assert torch.equal(grad, whole[f"d{name}"]), name


def test_no_pair_has_an_expert():
    inputs = build(SMALL, 300)
    out = ours(replace(inputs, ids=torch.full_like(inputs.ids, -1)))
    assert all(value.count_nonzero() == 0 for value in out.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_dims_take_pointers(dtype):
    inputs = build(shapes.Shape("odd", 97, 47, 5, 3), 333, "skewed", dtype)
    with spy_operands() as operands:
        out = ours(inputs)
    assert {path for _, path in operands} == {"pointer"}
    check(inputs, out, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_weights_under_autocast(dtype):
    inputs = build(shapes.SHAPES["qwen3-30b"], 1000, "balanced", torch.float32)
    with torch.autocast("cuda", dtype=dtype):
        out = ours(inputs)
    assert {tensor.dtype for tensor in out.values()} == {torch.float32}
    check(inputs, out, dtype, autocast=True)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_no_host_synchronisation(weights):
    inputs = build(shapes.SHAPES["qwen3-30b"], 1000, weights=weights)
    warm = ours(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = ours(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(out, warm)


@pytest.mark.parametrize("when", ["enter", "exit"])
def test_a_launch_hook_hears_of_every_launch(when, monkeypatch):
    """Planned launches included, which bypass Triton's own call. The results are the same."""
    from triton import knobs

    from fastexperts.kernels.launch import Plan

    hook = getattr(knobs.runtime, f"launch_{when}_hook")
    inputs, heard, launched = build(SMALL, 100), [], []
    quiet = ours(inputs)

    def listen(metadata):
        heard.append(metadata.get()["name"])

    def again(plan, *args):
        launched.append(plan.kernel.__name__)
        original(plan, *args)

    original = Plan.again
    monkeypatch.setattr(Plan, "again", again)
    hook.add(listen)
    try:
        loud = ours(inputs)
    finally:
        hook.remove(listen)
    assert heard == launched
    assert {"_count", "_scan", "_place", "_combine"} < set(heard)
    launches = len(heard)
    assert equal(ours(inputs), quiet)
    assert equal(loud, quiet)
    assert len(heard) == launches


def test_sync_debug_mode_would_have_told():
    ids = torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            ids.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [0, 1, 3, 1000, 40_000])
def test_blocks_are_claimed_once_and_the_counter_is_set_back(tokens):
    """Fewer blocks than programs, about as many, and many more, in each pass in turn on one routing."""
    kernels = pytest.importorskip("fastexperts.kernels")
    shape, dtype, act = SMALL, torch.bfloat16, ACTIVATIONS["swiglu"]
    inputs = build(shape, tokens, "skewed", dtype)
    routing = kernels.route(inputs.ids, shape.experts, kernels.block_m(inputs.x.device, dtype))
    first = None
    for _ in range(3):
        h, a = kernels.up(inputs.x, inputs.w1, None, routing, act, True)
        y = kernels.down(a, inputs.w2, None, routing)
        every = (True, True, True)
        dh, wa, _ = kernels.dh(inputs.dout, inputs.w2, h, inputs.weight, routing, act, every)
        dx = kernels.dx(dh, inputs.w1, routing)
        dw1 = kernels.dw(dh, inputs.x, routing, inputs.w1, tokens="right")
        dw2 = kernels.dw(inputs.dout, wa, routing, inputs.w2, tokens="left")
        assert routing.schedule_S3[0, 2].item() == 0
        results = (h, a, y, dh, wa, dx, dw1, dw2)
        first = first or [t.clone() for t in results]
        assert all(torch.equal(t, other) for t, other in zip(results, first, strict=True))


def test_twenty_runs_are_bitwise_equal():
    inputs = build(shapes.SHAPES["qwen3-30b"], 4096, "skewed")
    first = ours(inputs)
    assert all(equal(ours(inputs), first) for _ in range(19))


def test_a_tokens_row_does_not_depend_on_its_mates():
    inputs = build(shapes.SHAPES["qwen3-30b"], 1000, "skewed")
    whole = ours(inputs)
    pick = torch.arange(0, 1000, 7, device="cuda")
    few = Inputs(
        inputs.x[pick], inputs.ids[pick], inputs.weight[pick], inputs.w1, inputs.w2, inputs.dout[pick]
    )
    part = ours(few)
    for name in ("out", "dx", "dweight"):
        assert torch.equal(part[name], whole[name][pick])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_by_inductor(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(moe_mlp, fullgraph=True, dynamic=dynamic)
    for tokens in (200, 333) if dynamic else (200,):
        inputs = build(SMALL, tokens)
        with spy_backend() as calls:
            out = ours(inputs, compiled)
        assert {backend for backend, *_ in calls} == {"kernels"}
        assert equal(out, ours(inputs))


def test_a_cuda_graph_replays_any_routing():
    inputs = build(SMALL, 300)
    ours(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(inputs)
    for seed, kind in enumerate(("skewed", "balanced", "skewed"), start=1):
        ids, weight = shapes.routing(SMALL, 300, kind, "cuda", seed)
        inputs.ids.copy_(ids)
        inputs.weight.copy_(weight)
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in captured.items()}
        assert equal(replayed, ours(inputs))
        check(inputs, replayed, torch.bfloat16)


def test_nothing_is_kept_but_x_and_h():
    """Between the passes: h, a, the routing, and no copy of a weight."""
    shape = shapes.SHAPES["qwen3-30b"]
    inputs = build(shape, 1000)
    leaves = [leaf.detach().requires_grad_() for leaf in inputs.leaves.values()]
    ours(inputs)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    out = moe_mlp(leaves[0], inputs.ids, *leaves[1:])
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    rows = 1000 * shape.top_k
    assert rows * 2 * shape.dim_f * 2 <= kept <= rows * 2 * shape.dim_f * 2 + 2**22


# More than 2^31 elements in one tensor: h, the rows of D, or a weight.
BOUNDARY = {
    "h": (shapes.Shape("h", 64, 768, 128, 8), 180_000),
    "rows": (shapes.Shape("rows", 2048, 64, 64, 8), 140_000),
    "weights": (shapes.Shape("weights", 4096, 1536, 192, 2), 500),
}


@pytest.mark.usefixtures("one_large")
@pytest.mark.parametrize("tensor", BOUNDARY)
def test_beyond_int32(tensor):
    shape, tokens = BOUNDARY[tensor]
    inputs = build(shape, tokens)
    rows = tokens * shape.top_k
    sizes = {"h": rows * 2 * shape.dim_f, "rows": rows * shape.dim_d, "weights": inputs.w1.numel()}
    assert sizes[tensor] > 2**31
    check(inputs, ours(inputs), torch.bfloat16)


@pytest.mark.usefixtures("one_large")
def test_a_column_major_x_beyond_int32():
    shape = shapes.Shape("x", 4096, 16, 4, 1)
    inputs = build(shape, 2**19 + 77)
    columns = replace(inputs, x=inputs.x.t().contiguous().t())
    assert columns.x.stride() == (1, 2**19 + 77)
    assert equal(ours(columns), ours(inputs))
