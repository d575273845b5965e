"""fastexperts.hf.bypass: enable() sees the forwards past which no experts implementation ever runs."""

import ast
import functools
import inspect
from importlib import import_module
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as nnf
import transformers
from support_hf import Ops, relative, tiny_model, tokens
from torch import nn
from transformers.integrations.moe import batched_mm_experts_forward

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf.bypass import _calls

FORM = r"`.+` got (.|\n)+; it needs .+\. .+"


class HubMoe(nn.Module):
    """What a kernel of the hub is: a layer without state, whose forward is bound to a block of the model."""

    def forward(self, hidden_states):
        x_TD = hidden_states.flatten(0, -2)
        _, weight_TK, ids_TK = self.gate(x_TD)
        alpha = getattr(self.experts, "alpha", 1.0)
        gate, up = torch.einsum("td,egd->teg", x_TD, self.experts.gate_up_proj).chunk(2, dim=-1)
        y_TED = torch.einsum("tef,edf->ted", nnf.silu(alpha * gate) * up, self.experts.down_proj)
        weight_TE = torch.zeros(y_TED.shape[:2]).scatter(1, ids_TK, weight_TK)
        return torch.einsum("ted,te->td", y_TED, weight_TE).view_as(hidden_states)


def kernelized(model, monkeypatch):
    """What kernels.kernelize does to the blocks of `model`."""
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(HubMoe.forward, layer.mlp)


def class_of_block_patched(model, monkeypatch):
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", HubMoe.forward)


def class_of_experts_patched(model, monkeypatch):
    cls = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(cls, "forward", batched_mm_experts_forward)


def eager_forward_put_back(model, monkeypatch):
    cls = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(cls, "forward", inspect.unwrap(cls.forward))


def experts_of_one_layer_patched(model, monkeypatch):
    experts = model.model.layers[1].mlp.experts
    experts.forward = lambda *args: batched_mm_experts_forward(experts, *args)


PATCHES = {
    "kernels of the hub": (kernelized, "Qwen3MoeSparseMoeBlock: `forward` got test_hf_bypass.HubMoe", 0),
    "the class of the block": (class_of_block_patched, "never calls self.experts(...)", 0),
    "the class of the experts": (class_of_experts_patched, "Qwen3MoeExperts: `forward` got", 0),
    "the eager forward": (eager_forward_put_back, "Qwen3MoeExperts: `forward` got", 0),
    "one experts module": (experts_of_one_layer_patched, "Qwen3MoeExperts: `forward` got", 1),
}


@pytest.mark.parametrize("what", PATCHES)
def test_a_forward_that_bypasses_the_interface_is_refused(what, monkeypatch):
    patch, named, reached = PATCHES[what]
    fastexperts.register()
    model = tiny_model("qwen3_moe", "fastexperts").eval()
    wanted = model(tokens()).logits
    patch(model, monkeypatch)
    with Ops() as ops:
        logits = model(tokens()).logits
    assert relative(logits, wanted) < 1e-5, "it computes the same, and says nothing"
    assert ops.names.count("fastexperts::moe_mlp") == reached, "the premise: ours is not reached"

    model.set_experts_implementation("eager")
    with pytest.raises(FastexpertsError, match=FORM) as error:
        fastexperts.enable(model)
    assert named in str(error.value)
    with pytest.raises(FastexpertsError, match="none of whose experts can be served"):
        fastexperts.enable(model, allow_unsupported=True)  # one config for all layers
    assert model.config._experts_implementation == "eager"


def test_adapters_do_not_hide_a_bypass():
    """PEFT stands between the block and its experts."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    model = peft.get_peft_model(tiny_model("qwen3_moe", "eager"), lora)
    block = model.base_model.model.model.layers[1].mlp
    block.forward = MethodType(HubMoe.forward, block)
    with pytest.raises(FastexpertsError, match=r"never calls self\.experts"):
        fastexperts.enable(model)


def kernelize_without_a_kernel(model):
    """Where the hub has none for a device, kernels.kernelize binds the forward of the class itself."""
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(type(layer.mlp).forward, layer.mlp)


def accelerate_hooks(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for layer in model.model.layers:
        for module in (layer.mlp, layer.mlp.experts):
            hooks.add_hook_to_module(module, hooks.ModelHook())
        assert "forward" in vars(layer.mlp.experts)


def wrapped(model):
    for layer in model.model.layers:
        for module in (layer.mlp, layer.mlp.experts):
            forward = module.forward
            module.forward = functools.wraps(forward)(lambda *args, forward=forward: forward(*args))


def closed_over(model):
    """A patch as scripts write it."""

    def patch(module):
        original = module.forward

        def patched(*args):
            return original(*args)

        module.forward = patched

    for layer in model.model.layers:
        patch(layer.mlp)
        patch(layer.mlp.experts)


class Dispatch:
    """What transformers' expert parallelism lays a closure around."""

    def __init__(self, experts):
        self.experts_forward = experts.forward

    def __call__(self, *args):
        return self.experts_forward(*args)


def expert_parallel(model):
    def install(module):
        implementation = Dispatch(module)

        def ep_forward(hidden_states, top_k_index, top_k_weights):
            return implementation(hidden_states, top_k_index, top_k_weights)

        module.forward = ep_forward

    for layer in model.model.layers:
        install(layer.mlp.experts)


def through_a_method(model):
    """A block of another class, which reaches its experts by a method of its own and with *args."""

    class Block(type(model.model.layers[0].mlp)):
        def forward(self, hidden_states):
            x_TD = hidden_states.flatten(0, -2)
            _, weight_TK, ids_TK = self.gate(x_TD)
            return self.routed(x_TD, ids_TK, weight_TK).view_as(hidden_states)

        def routed(self, *args):
            return self.experts(*args)

    for layer in model.model.layers:
        layer.mlp.__class__ = Block


def through_super(model):
    class Block(type(model.model.layers[0].mlp)):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    for layer in model.model.layers:
        layer.mlp.__class__ = Block


def in_a_list(model):
    """A block that holds its experts in a container."""

    class Block(type(model.model.layers[0].mlp)):
        def forward(self, hidden_states):
            x_TD = hidden_states.flatten(0, -2)
            _, weight_TK, ids_TK = self.gate(x_TD)
            return sum(part(x_TD, ids_TK, weight_TK) for part in self.parts).view_as(hidden_states)

    for layer in model.model.layers:
        layer.mlp.parts = nn.ModuleList([layer.mlp.experts])
        del layer.mlp.experts
        layer.mlp.__class__ = Block


def checkpoint_wrapper(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for layer in model.model.layers:
        layer.mlp.experts = checkpoint_wrapper(layer.mlp.experts)


@pytest.mark.parametrize(
    "wrap",
    [
        kernelize_without_a_kernel,
        accelerate_hooks,
        wrapped,
        closed_over,
        expert_parallel,
        through_a_method,
        through_super,
        in_a_list,
        checkpoint_wrapper,
    ],
)
def test_what_wraps_a_forward_bypasses_nothing(wrap):
    model = tiny_model("qwen3_moe", "eager").eval()
    wrap(model)
    assert len(fastexperts.enable(model, verbose=False).served) == 2
    with Ops() as ops:
        model(tokens())
    assert ops.names.count("fastexperts::moe_mlp") == 2


@pytest.mark.parametrize("part", ["mlp", "mlp.experts"])
def test_what_kernels_may_replace_later_is_refused(part, monkeypatch):
    """Transformers puts the kernels in again at each change between train() and eval()."""
    model = tiny_model("qwen3_moe", "eager")
    cls = type(model.model.layers[0].get_submodule(part))
    monkeypatch.setattr(cls, "kernel_layer_name", "HubMoe", raising=False)
    assert fastexperts.enable(model, verbose=False).served, "without use_kernels it is no more than a name"
    model._use_kernels = True
    assert model.use_kernels
    with pytest.raises(FastexpertsError, match=r"`use_kernels` got True(.|\n)+Load the model without"):
        fastexperts.enable(model)


def test_kernels_of_other_layers_are_no_bypass():
    model = tiny_model("qwen3_moe", "eager")
    model._use_kernels = True
    assert fastexperts.enable(model, verbose=False).served


@pytest.mark.slow  # imports every family: 8 s
def test_no_block_of_transformers_is_taken_for_a_bypass():
    checked = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            continue
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        decorated = {c.name for c in classes if "use_experts_implementation" in map(_name, c.decorator_list)}
        module = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for node in classes:
            made = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            if made & decorated:
                cls = getattr(module, node.name)
                block = cls.__new__(cls)
                assert _calls(block, cls.forward, "experts"), node.name
                assert not _calls(block, cls.forward, "no_such_attribute"), node.name
                checked.append(node.name)
    assert len(checked) >= 40


def _name(decorator):
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
