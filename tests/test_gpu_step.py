"""The whole step on a GPU: gradients by the bf16 rule, with bf16 weights and under autocast; what is kept."""

import gc

import pytest
import torch
from support_liger import step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastexperts.hf import attention, kept_attention
from fastexperts.hf.optimize import PARTS, optimize

pytestmark = pytest.mark.gpu

VOCABULARY, BATCH, LENGTH = 512, 2, 512


@pytest.fixture(autouse=True)
def _needs_liger():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed on this GPU machine")


def _model(dtype, seed=0):
    """A GLM-4.5 of two layers, one dense, with pre-activations of about N(0, 1), alike for every dtype."""
    from support_hf import rescale
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
        use_cache=False,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation="eager", attn_implementation="eager", dtype=torch.float32
    )
    rescale(model, seed)
    return model.to("cuda", dtype).train()


def _batch(length=LENGTH, padding=0):
    """The last sequence ends with `padding` tokens that are none. (On the left they mask whole rows, whose
    scores overflow in eager's fp64.)
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (BATCH, length), generator=generator).cuda()
    there = torch.ones_like(ids)
    there[-1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": there, "labels": ids.where(there.bool(), -100)}


@pytest.mark.parametrize(("autocast", "length", "padding"), [
    (False, LENGTH, 0), (True, LENGTH, 0), (False, LENGTH, 100), (False, LENGTH + 64, 100),
], ids=["bf16-weights", "autocast", "padded", "padded-past-cudnn"])  # fmt: skip
def test_gradients_by_the_bf16_rule(autocast, length, padding):
    """Each is as near to fp64 as eager's of the same precision: factor 2, floor 2^-9, routers 2^-8.

    A top-k choice that bf16 flips moves both.
    """
    data = _batch(length, padding)
    truth = step(_model(torch.float64), data)
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        eager = step(_model(dtype), data)
        model = _model(dtype)
        summary = optimize(model, checkpoint="keep-attention", verbose=False)
        assert {part for part in PARTS if summary.on(part)} == set(PARTS) - {"adapters"}
        ours = step(model, data)
    _check_by_the_rule(ours, eager, truth)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-weights", "autocast"])
def test_gradients_of_adapters_by_the_bf16_rule(autocast):
    """As above, of LoRA on attention with factors in fp32; eager's is PEFT's."""
    peft = pytest.importorskip("peft")
    data = _batch()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]

    def adapted(dtype):
        config = peft.LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(_model(dtype), config)
        generator = torch.Generator("cuda").manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    drawn = torch.randn(parameter.shape, generator=generator, device="cuda")
                    parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
        return model.train()

    truth = step(adapted(torch.float64).double(), data)
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        eager = step(adapted(dtype), data)
        model = adapted(dtype)
        only = {name: name == "adapters" for name in PARTS}
        summary = optimize(model, parts=only, checkpoint="off", verbose=False)
        (row,) = summary.of("adapters")
        assert (row.on, row.modules) == (True, 2 * 4)
        ours = step(model, data)
    assert all(t.dtype == torch.float32 for name, t in ours.items() if "lora_" in name)
    _check_by_the_rule(ours, eager, truth)


def _check_by_the_rule(ours, eager, truth):
    assert ours.keys() == eager.keys() == truth.keys()
    for name, expected in truth.items():
        norm = expected.norm()
        floor = 2.0**-8 if "mlp.gate." in name else 2.0**-9
        theirs = (eager[name].double() - expected).norm()
        error = (ours[name].double() - expected).norm()
        print(f"{name}: {error / norm:.2e}, eager {theirs / norm:.2e}")
        assert error <= 2 * max(theirs, floor * norm), (
            f"{name}: {error / norm:.2e}, eager {theirs / norm:.2e}"
        )


KERNELS = {
    f"aten::_scaled_dot_product_{kernel}_attention": kernel for kernel in ("cudnn", "flash", "efficient")
}


def _attention_kernels(call):
    """The kernels of attention that `call` takes, of its backward as well."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.key.removesuffix("_backward") for event in profile.key_averages()}
    return {kernel for name, kernel in KERNELS.items() if name in names}


@pytest.mark.parametrize(("length", "padding", "kernel"), [
    (512, 0, "cudnn"), (500, 0, "cudnn"), (576, 0, "cudnn"), (512, 100, "cudnn"), (576, 100, "efficient"),
])  # fmt: skip
def test_which_kernel_attention_takes(length, padding, kernel):
    """As PyTorch chooses, but for masks with which cuDNN's errs: as sdpa asks cuDNN first, or flash."""
    if not attention.cudnn_comes_first("cuda"):
        kernel = "efficient" if padding else "flash"
    model, data = _model(torch.bfloat16), _batch(length, padding)
    for checkpoint in ("off", "keep-attention", "full"):
        optimize(model, checkpoint=checkpoint, verbose=False)
        assert _attention_kernels(lambda: step(model, data)) == {kernel}


def test_no_nan_where_cudnn_gives_them():
    """Scores of about -120, a mask, and 704 = 5 * 128 + 64 keys: PyTorch's issue 196678."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 1, 704, 64, generator=generator, device="cuda").mul(scale).to(torch.bfloat16)
        for scale in (0.1, 0.1, 1.0, 1.0)
    )
    q[..., 0], k[..., 0] = 1.0, -120 * 64**0.5
    mask = torch.ones(704, 704, dtype=torch.bool, device="cuda").tril()[None, None]

    def gradients(function, dtype, *arguments):
        leaves = [heads.to(dtype).requires_grad_() for heads in (q, k, v)]
        out, _ = function(*arguments, torch.nn.Module(), *leaves, mask)
        return torch.autograd.grad(out, leaves, dout.to(dtype).transpose(1, 2))

    truth = gradients(sdpa_attention_forward, torch.float64)
    ours = gradients(attention.guarded, torch.bfloat16, sdpa_attention_forward)
    theirs = gradients(sdpa_attention_forward, torch.bfloat16)
    for name, a, b, expected in zip("qkv", ours, theirs, truth, strict=True):
        assert a.isfinite().all(), f"d{name}"
        # Of dq the first column is 0 by cancellation: in bf16 -960 times what rounding leaves.
        error, stock = ((d.double() - expected)[..., 1:].norm() / expected[..., 1:].norm() for d in (a, b))
        print(f"d{name}: {error:.1e}, as PyTorch chooses {stock:.1e}")
        assert error <= 2e-2, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
def test_attention_that_can_be_kept_is_sdpa(backend, causal):
    """The same output to the bit; gradients, which cuDNN does not repeat, as near to fp64's."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 8, 200, 64), (2, 2, 200, 64), (2, 2, 200, 64), (2, 8, 200, 64))
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    assert ("cuda", backend) in kept_attention.KERNELS

    def run(function, dtype):
        leaves = [heads.to(torch.bfloat16).to(dtype).requires_grad_() for heads in (q, k, v)]
        out = function(*leaves, is_causal=causal, scale=0.2, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(torch.bfloat16).to(dtype))]

    truth = run(scaled_dot_product_attention, torch.float64)
    with sdpa_kernel(backend):
        theirs = run(scaled_dot_product_attention, torch.bfloat16)
        with kept_attention.KeptSdpa():
            ours = run(scaled_dot_product_attention, torch.bfloat16)
    assert torch.equal(ours[0], theirs[0])
    for a, b, expected in zip(ours, theirs, truth, strict=True):
        error, stock = ((t.double() - expected).norm() / expected.norm() for t in (a, b))
        assert error <= 2 * stock + 2.0**-9


def _kept(model, data):
    """Bytes that a forward leaves allocated."""
    gc.collect()  # what other tests left in cycles is not to go while the forward runs
    before = torch.cuda.memory_allocated()
    loss = model(**data, use_cache=False).loss
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return kept


def test_what_is_kept_is_what_the_estimate_tells():
    from fastexperts.hf.recompute import MODES, estimate

    data, kept, told = _batch(), {}, {}
    for mode in MODES:
        model = _model(torch.bfloat16)
        optimize(model, checkpoint=mode, verbose=False)
        _kept(model, data)  # whatever the first call allocates for good
        model.zero_grad(set_to_none=True)
        kept[mode] = _kept(model, data)
        layers = estimate(model, BATCH * LENGTH, "cuda", fused=True).layers
        told[mode] = BATCH * LENGTH * sum(layer.of(mode) for layer in layers)
    assert kept["keep-experts"] - kept["full"] == pytest.approx(told["keep-experts"] - told["full"], rel=0.2)
    more, told_more = (of["keep-attention"] - of["keep-experts"] for of in (kept, told))
    assert more == pytest.approx(told_more, rel=0.1)
    assert 0.5 <= (told["off"] - told["keep-experts"]) / (kept["off"] - kept["keep-experts"]) <= 1.5


def test_a_model_that_is_still_on_the_cpu_is_served_for_the_gpu():
    model = _model(torch.bfloat16).cpu()
    summary = optimize(model, tokens=BATCH * LENGTH, verbose=False)
    assert {part for part in PARTS if summary.on(part)} == set(PARTS) - {"adapters"}
    assert summary.checkpoint == "off", "a small model"
    on_cpu = {name: tensor.cpu() for name, tensor in _batch().items()}
    assert model.eval()(**{name: tensor[:, :8] for name, tensor in on_cpu.items()}).logits.isfinite().all()
    assert step(model.cuda().train(), _batch())["loss"].isfinite()
