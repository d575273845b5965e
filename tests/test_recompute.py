"""Checkpointing modes: what is kept, what runs again, and the estimate that chooses between them."""

import copy
import gc
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from families import case_of, tiny_family
from families import step as family_step
from support_hf import assert_close, tiny_model, tokens
from support_liger import Alive, step
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastexperts
from fastexperts import cpu, ops
from fastexperts.errors import FastexpertsError
from fastexperts.hf import kept_attention, recompute, unread
from fastexperts.hf.recompute import MODES, Estimate, Kept, estimate
from fastexperts.metrics.mfu import kept, recomputed_share

FAMILIES = ["qwen3_moe", "deepseek_v3"]
KEPT = {"keep-experts": {"moe_mlp"}, "keep-attention": {"moe_mlp", "attention"}}


def model_in(family, mode, **overrides):
    model = tiny_model(family, "eager", **overrides).train()
    fastexperts.enable(model, verbose=False)
    recompute.apply(model, mode)
    return model


class Attentions(TorchDispatchMode):
    """Counts the kernels of attention."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in kept_attention.OPS
        return func(*args, **(kwargs or {}))


def batch(length=24):
    ids = tokens(length=length)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_mode_gives_the_same_bits_and_runs_the_experts_as_often_as_it_says(family, monkeypatch):
    results, calls, ups = {}, {}, []
    up = cpu.up
    monkeypatch.setattr(cpu, "up", lambda *args: ups.append(1) or up(*args))
    for mode in MODES:
        model = model_in(family, mode)
        ups.clear()
        with Attentions() as attentions:
            results[mode] = step(model, batch())
        calls[mode] = len(ups), attentions.calls
    experts = sum("Experts" in type(module).__name__ for module in model.modules())
    # on a CPU PyTorch has no kernel of attention whose keys are wider than its values
    layers = 0 if family == "deepseek_v3" else len(list(recompute.decoder_layers(model)))
    assert calls == {
        "off": (experts, layers),
        "keep-attention": (experts, layers),
        "keep-experts": (experts, 2 * layers),
        "full": (2 * experts, 2 * layers),
    }, "of the last half without w2"
    for mode in MODES[1:]:
        assert_close(results[mode], results["off"], 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(mode):
    model = model_in("qwen3_moe", mode)
    loss = model(**batch()).loss
    leaves = list(model.parameters())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", MODES[1:])
def test_two_forwards_before_their_backwards_keep_apart_what_is_kept(mode):
    """As of a policy and its reference; the later graph is run first."""
    results = {}
    for order in ((0, 1), (1, 0)):
        model = model_in("qwen3_moe", mode)
        losses = [model(**batch(length)).loss for length in (24, 16)]
        grads = {i: torch.autograd.grad(losses[i], list(model.parameters())) for i in order}
        results[order] = [*grads[0], *grads[1]]
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))


class Counting(ops.ResultsThrough):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def through(self, op, compute):
        self.calls += 1
        return compute()


def test_what_gives_results_ends_with_its_context_also_by_an_error():
    through = Counting()
    x, ids, weight = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    call = partial(fastexperts.moe_mlp, x, ids, weight, torch.randn(2, 8, 8), torch.randn(2, 8, 4))
    with through:
        call()
        with through:
            call()
        call()
    with pytest.raises(FastexpertsError), through:
        call(activation="none such")
    call()
    assert through.calls == 3


@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_collector_of_cycles(mode):
    """After a step, what was kept; after the model, all that it had."""
    gc.collect()
    gc.disable()
    try:
        with Alive() as alive:
            model = model_in("qwen3_moe", mode)
            data, sizes = batch(), []
            for _ in range(3):
                step(model, data)
                sizes.append(alive.bytes(collect=False))
            assert sizes[0] == sizes[1] == sizes[2]
            assert not any(issubclass(type(o), ops.ResultsThrough) for o in gc.get_objects())
            parameters = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
            del model
            gc.collect()  # modules are cycles
        assert all(parameter.expired() for parameter in parameters)
    finally:
        gc.enable()


def test_what_a_layer_writes_over_is_not_given_again():
    x, w1, w2 = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    ids, weight = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)

    def layer(x):
        out = fastexperts.moe_mlp(x, ids, weight, w1, w2)
        out += x
        return out.sin()

    y = checkpoint(layer, x, use_reentrant=False, context_fn=recompute.CONTEXTS["keep-experts"])
    with pytest.raises(FastexpertsError, match="checkpoint='full'"):
        y.sum().backward()


@pytest.mark.parametrize("mode", MODES[1:])
def test_compiled_whole(mode):
    """torch.compile takes policies for checkpoints, and no other contexts."""
    torch._dynamo.reset()
    expected = step(model_in("qwen3_moe", "off"), batch())
    model = model_in("qwen3_moe", mode)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**batch(), use_cache=False).loss
    loss.backward()
    got = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    assert_close(got, expected)


def test_full_recomputation_needs_no_w2_and_no_combine(monkeypatch):
    """Nor do adapters: their rows, a few columns of a pair, are kept, and the routing of these."""
    peft = pytest.importorskip("peft")
    calls, names = [], ("up", "down", "combine", "shrink", "route")
    for name in names:
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu,
            name,
            lambda *args, _name=name, _run=original, **kwargs: calls.append(_name) or _run(*args, **kwargs),
        )
    config = peft.LoraConfig(
        r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], init_lora_weights=False
    )
    results, counted = {}, {}
    for mode in ("off", "full"):
        model = model_in("qwen3_moe", mode)
        torch.manual_seed(0)
        calls.clear()
        results[mode] = step(peft.get_peft_model(model, config), batch())
        counted[mode] = [calls.count(name) for name in names]
    # the third and fourth combine are of dx: checkpointing asks for that of the first layer's input as well;
    # half of the shrinks are of gradients
    assert counted == {"off": [2, 2, 3, 8, 2], "full": [4, 2, 4, 8, 2]}
    assert_close(results["full"], results["off"], 0)


def test_rows_of_adapters_are_kept_apart_given_again_and_let_go():
    peft = pytest.importorskip("peft")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=targets, init_lora_weights=False)

    def gradients(mode, order):
        """Of two losses, in this order, each twice."""
        model = model_in("qwen3_moe", mode)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        leaves = [p for p in model.parameters() if p.requires_grad]
        losses = [model(**batch(length)).loss for length in (24, 16)]
        once = {i: torch.autograd.grad(losses[i], leaves, retain_graph=True) for i in order}
        again = {i: torch.autograd.grad(losses[i], leaves) for i in order}
        assert all(torch.equal(a, b) for i in order for a, b in zip(once[i], again[i], strict=True))
        return [*once[0], *once[1]]

    gc.collect()
    gc.disable()
    try:
        expected = gradients("off", (0, 1))
        for order in ((0, 1), (1, 0)):
            assert all(map(torch.equal, gradients("full", order), expected))
        assert not any(issubclass(type(o), ops.ResultsThrough) for o in gc.get_objects())
    finally:
        gc.enable()


def test_a_layer_that_reads_its_experts_output_computes_it_again():
    """In gemma4 a norm comes after the experts; with NaN in their place its gradients are NaN."""
    results = {}
    for mode in ("off", "full", "forced"):
        model = tiny_family(case_of("gemma4"))
        fastexperts.enable(model, verbose=False)
        assert recompute.apply(model, "full" if mode == "forced" else mode) == 0
        if mode == "forced":
            unread.skip([layer for _, layer in recompute.decoder_layers(model)])
        results[mode] = family_step(model)
    assert results["full"].keys() == results["off"].keys()
    assert all(torch.equal(results["full"][name], grad) for name, grad in results["off"].items())
    assert any(grad.isnan().any() for grad in results["forced"].values()), "loud"


def test_what_cannot_be_run_here_computes_all_again():
    model = tiny_model("qwen3_moe", "eager")
    fastexperts.enable(model, verbose=False)
    layers = [layer for _, layer in recompute.decoder_layers(model)]
    frozen = model.lm_head.weight.requires_grad_(False)
    assert unread.unread_layers(model, layers) == layers
    assert model.training
    assert not frozen.requires_grad
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    model.forward = lambda pixels: None
    assert unread.unread_layers(model, layers) == []
    assert unread.unread_layers(tiny_model("qwen3_moe", "eager").to("meta"), layers) == []
    stock = tiny_model("qwen3_moe", "eager")
    assert recompute.apply(stock, "full") == 0, "experts that are not ours"


def kept_by(family, mode):
    """(bytes alive after the forward of a model's layers, those that the estimate tells)."""
    model, ids = model_in(family, mode, hidden_size=64), tokens(length=24)
    with Alive() as alive:
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    told = estimate(model, ids.numel(), "cpu", fused=True)
    kept = alive.bytes()
    del out
    return kept, ids.numel() * sum(layer.of(mode) for layer in told.layers)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_the_estimate_tells_what_is_kept(family):
    """Beyond what full recomputation keeps, which is the layers' inputs beside what lies outside of them.

    The rest of a layer is a rough number: norms of PyTorch's keep more than Liger's, MLA copies its heads.
    """
    (full, told_full), (keep, told_keep), (off, told_off) = (
        kept_by(family, mode) for mode in ("full", "keep-experts", "off")
    )
    assert keep - full == pytest.approx(told_keep - told_full, rel=0.1)
    assert 0.5 <= (told_off - told_keep) / (off - keep) <= 1.3


def plain(memory, **changes):
    """Two layers that keep 10 bytes of a token as input, 30 of experts, 20 of attention, 40 of the rest."""
    arguments = {"fixed": 1000, "logits": 500, "layers": (Kept(10, 30, 20, 40),) * 2, "tokens": 100}
    return Estimate(memory=memory, **(arguments | changes))


def test_the_peak_is_a_sum_that_can_be_done_by_hand():
    told = plain(0)
    assert told.of("off") == 1000 + 500 + 100 * 2 * 100
    assert told.of("keep-experts") == 1000 + 100 * 60 + 100 * 2 * 40, (
        "a layer again takes more than the logits"
    )
    assert told.of("keep-attention") == 1000 + 100 * 40 + 100 * 2 * 60
    assert told.of("full") == 1000 + 100 * 90 + 100 * 2 * 10
    assert plain(0, logits=9500).of("full") == 1000 + 9500 + 100 * 2 * 10


def test_the_mode_that_recomputes_least_and_fits_is_chosen():
    peaks = {mode: plain(0).of(mode) for mode in MODES}
    assert all(more > less for more, less in pairwise(peaks.values()))
    for mode, peak in peaks.items():
        enough = int(peak / recompute.USABLE) + 1
        assert plain(enough).choose() == mode
        assert plain(enough).fits(mode)
        assert not plain(int(peak / recompute.USABLE) - 1).fits(mode)
    assert plain(0).choose() == "full"
    assert plain(int(peaks["keep-experts"] / recompute.USABLE) + 1).choose(("off", "full")) == "full"


def test_auto_chooses_by_the_tokens_and_says_so(monkeypatch):
    monkeypatch.setattr(recompute, "free_memory", lambda where: 2**20)
    chosen = {}
    for count in (1, 130, 175, 10**6):
        model = tiny_model("qwen3_moe", "eager")
        summary = fastexperts.optimize(model, tokens=count, verbose=False)
        chosen[count] = summary.checkpoint
        assert f"at {count:,} tokens" in str(summary)
        assert (recomputed_share(model) == 1) == (summary.checkpoint != "off")
        assert kept(model) == KEPT.get(summary.checkpoint, frozenset())
        assert str(summary).__contains__(": none fits") == (count == 10**6)
    assert list(chosen.values()) == list(MODES)
    unknown = fastexperts.optimize(model, verbose=False)
    assert unknown.checkpoint == "full"
    assert "`tokens` of a step is not given" in str(unknown)
    asked = fastexperts.optimize(model, checkpoint="off", verbose=False)
    assert asked.checkpoint == "off"
    assert recomputed_share(model) == 0, "switched off again"


def test_an_adapter_adds_little():
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", "eager")
    before = estimate(model, 100, "cpu", fused=True)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    adapted = peft.get_peft_model(model, config).get_base_model()
    after = estimate(adapted, 100, "cpu", fused=True)
    columns = 2 * 16 * model.config.num_experts_per_tok  # of two projections, padded, in fp32
    for one, other in zip(after.layers, before.layers, strict=True):
        assert one == replace(other, again=other.again + 4 * columns, experts=other.experts + 4 * columns)
        assert one.of("full") - other.of("full") == 4 * columns
    assert after.fixed < before.fixed, "the base is frozen"


def test_an_adapter_on_shared_experts_adds_little():
    peft = pytest.importorskip("peft")
    model = tiny_model("glm4_moe", "eager")
    before = estimate(model, 100, "cpu", fused=True)
    config = fastexperts.lora_config(model, 2, shared_experts=True, verbose=False)
    adapted = peft.get_peft_model(model, config).get_base_model()
    after = estimate(adapted, 100, "cpu", fused=True)
    without = [replace(layer, experts=0, again=0) for layer in after.layers]
    assert without == [replace(layer, experts=0, again=0) for layer in before.layers]


def test_autocast_and_frozen_weights_count():
    model = tiny_model("qwen3_moe", "eager")
    whole = estimate(model, 100, "cpu", fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = estimate(model, 100, "cpu", fused=True)
    # a router's numbers are fp32 whatever the rest is
    assert half.layers[0].of("keep-experts") * 2 == whole.layers[0].of("keep-experts")
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert whole.fixed == 4 * weights + 100 * 3 * 32 * 4
    model.requires_grad_(False)
    assert estimate(model, 100, "cpu", fused=True).fixed == weights + 100 * 3 * 32 * 4
    assert whole.logits == 100 * 8 * 32 * 4 + 97 * 32 * 4
    assert estimate(model, 100, "cpu", fused=False).logits == 100 * 97 * (4 + 8)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_is_kept_also_under_autocast_and_with_groups(autocast):
    """Bitwise what sdpa gives without; autocast casts queries and keys before it chooses a kernel."""
    results = {}
    for mode in ("off", "keep-attention"):
        model = model_in("qwen3_moe", mode)
        assert model.config.num_key_value_heads < model.config.num_attention_heads
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Attentions() as attentions:
            results[mode] = step(model, batch())
    assert attentions.calls == 2
    assert_close(results["keep-attention"], results["off"], 0)


def test_with_a_mask_attention_is_computed_again():
    """None of the kernels that are kept takes one."""
    padded = batch() | {"attention_mask": torch.ones(2, 24, dtype=torch.long)}
    padded["attention_mask"][0, :3] = 0
    results, calls = {}, {}
    for mode in ("off", "keep-attention", "keep-experts"):
        with Attentions() as attentions:
            results[mode] = step(model_in("qwen3_moe", mode), padded)
        calls[mode] = attentions.calls
    assert calls == {"off": 2, "keep-attention": 4, "keep-experts": 4}
    assert_close(results["keep-attention"], results["off"], 0)


def patched():
    model = tiny_model("qwen3_moe", "eager")
    module = model.model.layers[0].self_attn
    module.forward = module.forward  # as another library's
    return model


def on_eager():
    return tiny_model("qwen3_moe", "eager", attn_implementation="eager")


@pytest.mark.parametrize(("make", "options", "with_what"), [
    (on_eager, {"parts": {"attention": False}}, "attention by eager"),
    (patched, {}, r"a forward put on the instance of model\.layers\.0\.self_attn"),
])  # fmt: skip
def test_attention_that_cannot_be_kept_is_refused_before_anything_changes(make, options, with_what):
    model = make()
    with pytest.raises(FastexpertsError, match=f"'keep-attention' for Qwen3MoeForCausalLM with {with_what}"):
        fastexperts.optimize(model, checkpoint="keep-attention", verbose=False, **options)
    assert model.config._experts_implementation == "eager"


def test_attention_that_cannot_be_kept_is_not_chosen(monkeypatch):
    monkeypatch.setattr(recompute, "free_memory", lambda where: 2**20)
    assert fastexperts.optimize(patched(), tokens=130, verbose=False).checkpoint == "keep-experts"
    switched = on_eager()  # the part attention takes it to sdpa
    assert fastexperts.optimize(switched, tokens=130, verbose=False).checkpoint == "keep-attention"


def test_restored_attention_is_kept_no_longer():
    model = tiny_model("qwen3_moe", "eager")
    summary = fastexperts.optimize(model, checkpoint="keep-attention", verbose=False)
    assert "attention with a mask" in str(summary)
    assert kept(model) == KEPT["keep-attention"]
    model = copy.deepcopy(model)
    fastexperts.hf.optimize.restore(model)
    assert kept(model) == KEPT["keep-experts"]
    with Attentions() as attentions:
        step(model, batch())
    assert attentions.calls == 4


def test_on_the_meta_device_attention_is_as_always():
    query = torch.empty(1, 4, 8, 16, device="meta", requires_grad=True)
    with kept_attention.KeptSdpa():
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert torch.autograd.grad(out.sum(), query)[0].shape == query.shape


def test_attention_that_runs_another_way_the_second_time_is_pytorchs_error():
    """Never the results of another op."""
    model = model_in("qwen3_moe", "keep-attention")
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(**batch()).loss
    with pytest.raises(CheckpointError):
        loss.backward()
