"""`ExpertGradients` finds each kind of missing gradient, names it, and raises no alarm where none is due."""

import re

import pytest
import torch
from peft import get_peft_model
from support_hf import TINY, tiny_model, tokens
from torch import nn

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf.inventory import interface_modules
from fastexperts.metrics.routing_health import ExpertLoad
from fastexperts.train.gradients import STEPS, ExpertGradients

RANK = 4


def adapted(family="qwen3_moe", implementation="fastexperts", **options):
    fastexperts.register()
    model = tiny_model(family, implementation)
    config = fastexperts.lora_config(model, RANK, alpha=8, verbose=False, **options)
    return get_peft_model(model, config).train()


def factor(model, which, end="layers.1.mlp.experts.base_layer"):
    """lora_A or lora_B of gate_up_proj in the last layer (or of another wrapper)."""
    return getattr(model.get_submodule(f"base_model.model.model.{end}"), which)["default"].weight


def run(model, steps=2, rate=1e-2, labels=None, callback=None, trained=None, ids=None):
    """Train for `steps` under the callback; returns its lines."""
    lines = []
    callback = callback or ExpertGradients(lines.append)
    callback.on_train_begin(None, None, None, model=model)
    parameters = [p for p in model.parameters() if p.requires_grad] if trained is None else trained
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    for step in range(steps):
        batch = tokens(seed=step) if ids is None else ids
        model(batch, labels=batch if labels is None else labels).loss.backward()
        callback.on_pre_optimizer_step(None, None, None)
        optimizer.step()
        model.zero_grad()
    callback.on_train_end(None, None, None)
    return lines


def hooks(model):
    return sum(len(module._forward_hooks) for module in interface_modules(model).values())


@pytest.mark.parametrize("implementation", ["fastexperts", "eager"])
@pytest.mark.parametrize("family", TINY)
def test_a_sound_run_is_passed_after_two_steps_and_left_alone(family, implementation):
    model = adapted(family, implementation)
    wrappers = 2 * len(interface_modules(model))
    lines, seen = [], []
    callback = ExpertGradients(lines.append)
    original = callback.on_pre_optimizer_step
    callback.on_pre_optimizer_step = lambda *args: (seen.append(hooks(model)), original(*args))
    run(model, steps=4, callback=callback)
    expected = f"Gradients: every LoRA factor of the experts gets one ({2 * wrappers} tensors, 2 steps)."
    assert lines == [expected]
    assert seen == [wrappers // 2] * 2 + [0] * 2, "after the second step nothing is hooked"


def zero(select):
    """A hook on a factor that zeroes the part of the gradient that `select` picks, in place of a bug."""

    def hook(gradient):
        gradient = gradient.clone()
        select(gradient).zero_()
        return gradient

    return hook


E, OUT = 8, 32
FAULTS = {
    "half of the experts, B": ("lora_B", lambda g: g.view(OUT, RANK, E)[..., : E // 2], "expert 0 (4 of"),
    "one expert, B": ("lora_B", lambda g: g.view(OUT, RANK, E)[..., 5], "in 1 of the 8 .* expert 5 (4 of"),
    "gate of all, B": ("lora_B", lambda g: g[: OUT // 2], "in 8 of the 8 experts"),
    "up of all, B": ("lora_B", lambda g: g[OUT // 2 :], "in 8 of the 8 experts"),
    "half of the ranks, B": ("lora_B", lambda g: g.view(OUT, RANK, E)[:, 2:], "expert 0 (2 of its 4 ranks"),
    "all, B": ("lora_B", lambda g: g, "in 8 of the 8 experts"),
    "half of the experts, A": (
        "lora_A",
        lambda g: g.view(E, RANK, -1)[4:],
        "in 4 of the 8 .* expert 4 (4 of",
    ),
    "one rank, A": ("lora_A", lambda g: g.view(E, RANK, -1)[3, 1], "in 1 of the 8 .* expert 3 (1 of its 4"),
    "all, A": ("lora_A", lambda g: g, "in 8 of the 8 experts"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_zeros_are_found_and_named(fault):
    which, select, message = FAULTS[fault]
    model = adapted()
    factor(model, which).register_hook(zero(select))
    callback, steps = ExpertGradients(), []
    original = callback.on_pre_optimizer_step
    callback.on_pre_optimizer_step = lambda *args: (steps.append(1), original(*args))
    with pytest.raises(FastexpertsError) as error:
        run(model, steps=3, callback=callback)
    name = f"base_model.model.model.layers.1.mlp.experts.base_layer.{which}.default.weight"
    assert f"`{name}` got a gradient of zero in" in str(error.value)
    assert re.search(message.replace("(", r"\("), str(error.value))
    assert len(steps) == {"lora_B": 1, "lora_A": 2}[which], "B in the first step, A in the second"


def test_the_down_projection_is_checked_as_well():
    model = adapted("mixtral")
    down = factor(model, "lora_B", "layers.0.mlp.experts")
    down.register_hook(zero(lambda g: g.view(32, RANK, 4)[..., :2]))
    with pytest.raises(FastexpertsError, match=r"layers\.0\.mlp\.experts\.lora_B.*in 2 of the 4 experts"):
        run(model)


def test_a_factor_outside_the_graph_is_found():
    model = adapted()
    callback = ExpertGradients()
    callback.on_train_begin(None, None, None, model=model)
    model(tokens(), labels=tokens()).loss.backward()
    factor(model, "lora_B").grad = None
    with pytest.raises(FastexpertsError, match=r"base_layer\.lora_B.*no gradient at all"):
        callback.on_pre_optimizer_step(None, None, None)


def test_experts_whose_tokens_have_no_label_are_not_asked():
    """Counting what is routed is not enough: a token without a label sends nothing back."""
    model = adapted()
    labels = tokens(batch=1)
    labels[:, :-2] = -100  # the last token's logits are not used, so one token is learned
    with ExpertLoad(model) as load:
        model(tokens(batch=1), labels=labels).loss.backward()
    last = factor(model, "lora_B").grad.view(OUT, RANK, E)
    silent = int(((last != 0).any(0).any(0).cpu() < (load.counts()[-1] > 0)).sum())
    assert silent >= 3, "experts that got tokens and, rightly, no gradient"
    model.zero_grad()
    lines = run(model, labels=labels, ids=tokens(batch=1), steps=2)
    assert "every LoRA factor of the experts gets one" in lines[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    for broken in (False, True):
        model = adapted()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if broken:
            factor(model, "lora_B").register_hook(zero(lambda g: g.view(OUT, RANK, E)[..., ::2]))
            with pytest.raises(FastexpertsError, match="in 4 of the 8 experts"):
                run(model)
        else:
            assert "2 steps" in run(model)[0]


def test_a_warm_up_from_zero_only_delays_the_check_of_a():
    model, lines = adapted(), []
    callback = ExpertGradients(lines.append)
    callback.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for step in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        if step < 2:
            assert factor(model, "lora_A").grad.norm() == 0, "B has not moved"
        callback.on_pre_optimizer_step(None, None, None)
        optimizer.param_groups[0]["lr"] = 0.0 if step == 0 else 0.1
        optimizer.step()
        model.zero_grad()
    assert "3 steps" in lines[0]


def test_an_optimizer_that_never_moves_b_is_found():
    model = adapted()
    trained = [p for name, p in model.named_parameters() if "lora_A" in name]
    with pytest.raises(
        FastexpertsError, match=rf"lora_A.default.weight` got no gradient to check in {STEPS}"
    ):
        run(model, steps=STEPS + 1, trained=trained)


def test_a_step_that_a_loss_scaler_skips_is_passed_over():
    """One gradient that overflows makes the norm infinite, and clipping by it zeros of all others."""
    model, lines = adapted(), []
    callback = ExpertGradients(lines.append)
    callback.on_train_begin(None, None, None, model=model)
    model(tokens(), labels=tokens()).loss.backward()
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_B[
        "default"
    ].weight.grad.view(-1)[0] = torch.inf
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) == torch.inf
    assert not factor(model, "lora_B").grad.any()
    callback.on_pre_optimizer_step(None, None, None)
    model.zero_grad()
    assert run(model, callback=callback) == []
    assert lines == ["Gradients: every LoRA factor of the experts gets one (8 tensors, 2 steps)."]


def cut_off(model, layer):
    """The layer runs, and nothing of what it computes is used."""
    block = model.get_submodule(f"base_model.model.model.layers.{layer}")
    block.register_forward_hook(lambda module, args, out: args[0])


def skip(model, layer):
    """The layer does not run."""
    model.get_submodule(f"base_model.model.model.layers.{layer}").forward = lambda x, **_: x


def bypass(model, layer):
    """The block runs, and computes something without its experts."""
    model.get_submodule(f"base_model.model.model.layers.{layer}.mlp").forward = lambda x: 2 * x


@pytest.mark.parametrize("unused", [cut_off, skip])
def test_blocks_that_no_gradient_reaches_are_not_asked(unused):
    """As those of a vision tower in a run on texts."""
    model = adapted()
    unused(model, 1)
    lines = run(model, steps=STEPS)
    assert lines[0].startswith("Gradients: 4 LoRA factors of the experts get one (20 steps); the other 4")
    assert "first base_model.model.model.layers.1.mlp.experts.lora_A" in lines[0]
    assert hooks(model) == 0
    unused(model, 0)
    model.enable_input_require_grads()
    with pytest.raises(FastexpertsError, match=rf"layers\.0.*no gradient to check in {STEPS}"):
        run(model, steps=STEPS)


def test_experts_that_their_block_does_not_call_are_found():
    model = adapted()
    bypass(model, 1)
    with pytest.raises(FastexpertsError, match=rf"layers\.1.*no gradient to check in {STEPS}"):
        run(model, steps=STEPS)


def test_an_expert_whose_tokens_all_weigh_nothing_is_not_asked():
    """As a router's that drops tokens by a weight of zero."""
    model = adapted()
    experts = list(interface_modules(model).values())[-1]

    def drop(module, args):
        x_TD, index_TK, weight_TK = args
        return x_TD, index_TK, weight_TK * (index_TK != 3)

    experts.register_forward_pre_hook(drop)
    model(tokens(), labels=tokens()).loss.backward()
    assert not factor(model, "lora_B").grad.view(OUT, RANK, E)[..., 3].any()
    model.zero_grad()
    assert "every LoRA factor of the experts gets one" in run(model)[0]


def test_a_run_of_one_step_says_what_was_not_checked():
    assert run(adapted(), steps=1) == [
        "Gradients: 4 of 8 LoRA factors of the experts were not checked, the run ended after 1 steps."
    ]


def test_what_any_micro_step_reached_is_asked_for():
    model = adapted()
    callback = ExpertGradients()
    callback.on_train_begin(None, None, None, model=model)
    few = tokens(batch=1, length=3)
    model(few, labels=few).loss.backward()
    layer = next(name for name in callback._reached if "layers.1" in name)
    unreached = (~callback._reached[layer][:E]).nonzero().flatten().tolist()
    assert unreached, "three tokens leave some experts out"
    for part in (tokens(), few):
        model(part, labels=part).loss.backward()
    factor(model, "lora_B").grad.view(OUT, RANK, E)[..., unreached[0]] = 0
    with pytest.raises(FastexpertsError, match=f"first in expert {unreached[0]} "):
        callback.on_pre_optimizer_step(None, None, None)


def test_factors_that_are_frozen_are_not_asked():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert run(model, steps=1) == [
        "Gradients: every LoRA factor of the experts gets one (4 tensors, 1 steps)."
    ]


def test_b_that_starts_away_from_zero_lets_a_be_checked_at_once():
    model = adapted()
    nn.init.normal_(factor(model, "lora_B"))
    factor(model, "lora_A").register_hook(zero(lambda g: g[: 2 * RANK]))
    with pytest.raises(FastexpertsError, match=r"lora_A.*in 2 of the 8 experts"):
        run(model, steps=1)


def test_a_model_without_adapted_experts_is_refused():
    model = adapted(experts=False)
    with pytest.raises(FastexpertsError, match="without trainable LoRA factors of experts"):
        ExpertGradients().on_train_begin(None, None, None, model=model)
