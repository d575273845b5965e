"""What a call may read: parameters may be sharded, and are refused where nothing has gathered them."""

import copy

import pytest
import torch
import torch.distributed as dist
from support_hf import assert_close, layer_inputs, outputs_and_gradients, tiny_model, tokens, toy_experts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf.experts import check_flags
from fastexperts.hf.plain import check_plain

WEIGHTS = ("gate_up_proj", "down_proj")


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()


@pytest.fixture
def mesh():
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(module, mesh):
    for name in WEIGHTS:
        module.register_parameter(
            name, nn.Parameter(distribute_tensor(getattr(module, name), mesh, [Shard(0)]))
        )


def test_a_sharded_weight_that_nothing_gathers_is_refused(mesh):
    module = toy_experts()
    shard(module, mesh)
    with pytest.raises(FastexpertsError, match="`gate_up_proj` got a DTensor") as error:
        module(*layer_inputs(module))
    assert "Shard(dim=0)" in str(error.value)
    assert "call the model" in str(error.value)


def test_a_model_made_for_inference_is_refused_with_the_way_out():
    with torch.inference_mode():
        model = tiny_model("qwen3_moe", "eager")
    with pytest.raises(FastexpertsError, match=r"Load the model outside of torch\.inference_mode\(\)"):
        fastexperts.enable(model, verbose=False)
    model = tiny_model("qwen3_moe", "eager")
    with torch.inference_mode():
        assert fastexperts.enable(model, verbose=False).served
        assert model(tokens()).logits.isfinite().all()


def test_enable_takes_sharded_weights_and_fsdp_gathers_them(mesh):
    model, eager = (tiny_model("qwen3_moe", "eager").train() for _ in range(2))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    summary = fastexperts.enable(model, verbose=False)
    assert [(row.served, row.experts) for row in summary.rows] == [(True, 8), (True, 8)]
    got, wanted = model(tokens()).logits, eager(tokens()).logits
    assert_close({"logits": got}, {"logits": wanted})
    got.square().mean().backward()
    wanted.square().mean().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_close(gradients, {name: p.grad for name, p in eager.named_parameters()})


class ZeRO3:
    """What DeepSpeed's stage 3 does to the parameters of a module: whole during its call and its backward,
    empty at other times.
    """

    def __init__(self, module):
        self.whole = {name: p.data for name, p in module.named_parameters()}
        for number, p in enumerate(module.parameters()):
            p.ds_id = number
        self.partition(module)
        module.register_forward_pre_hook(lambda module, args: self.gather(module))
        module.register_forward_hook(lambda module, args, output: self.partition(module))
        module.register_full_backward_pre_hook(lambda module, grad_output: self.gather(module))

    def gather(self, module):
        for name, p in module.named_parameters():
            p.data = self.whole[name]

    def partition(self, module):
        for p in module.parameters():
            p.data = torch.empty(0)


def test_weights_that_zero3_gathers_are_served():
    torch.manual_seed(0)
    module = toy_experts()
    inputs, wanted_from = layer_inputs(module), copy.deepcopy(module)
    wanted = outputs_and_gradients(wanted_from, wanted_from, inputs)
    ZeRO3(module)
    assert module.down_proj.numel() == 0
    assert_close(outputs_and_gradients(module, module, inputs), wanted, tolerance=0)


def test_a_weight_that_zero3_has_partitioned_is_refused():
    module = toy_experts()
    inputs = layer_inputs(module)
    ZeRO3(module)
    with pytest.raises(
        FastexpertsError, match="`gate_up_proj` got a parameter that DeepSpeed ZeRO-3"
    ) as error:
        module.forward(*inputs)
    assert "GatheredParameters" in str(error.value)


def test_an_empty_tensor_of_no_one_else_is_plain():
    check_plain(toy_experts(), "down_proj", torch.empty(0))


def adapted_model(change):
    """A model with LoRA on its experts; `change` is applied to each of PEFT's wrappers."""
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in WEIGHTS]
    )
    model = peft.get_peft_model(tiny_model("qwen3_moe", "fastexperts"), config)
    for wrapper in model.modules():
        if type(wrapper).__name__ == "ParamWrapper":
            change(wrapper)
    return model


def test_sharded_factors_are_refused(mesh):
    """What FSDP2 leaves if it is applied to each factor by itself: PEFT reads them outside their forward."""

    def change(wrapper):
        fully_shard(wrapper.lora_A["default"], mesh=mesh)

    with pytest.raises(FastexpertsError, match="`lora_A` got a DTensor"):
        adapted_model(change)(tokens())


def test_factors_of_experts_elsewhere_are_refused():
    def change(wrapper):
        wrapper.get_base_layer().num_experts = 4

    with pytest.raises(FastexpertsError, match="an adapter of 8 experts, 4 of which are on this rank"):
        adapted_model(change)(tokens())


@pytest.mark.parametrize("flag", ["has_bias", "has_post_expert_norm"])
def test_what_each_rank_would_apply_to_its_slice_is_refused(flag):
    """transformers marks what it sharded as hooked, and expert parallelism as such (here: it did not)."""
    module = toy_experts()
    setattr(module, flag, True)  # transformers 5.17 has no argument for the second
    module._is_hooked, module._is_expert_parallel = True, False
    with pytest.raises(FastexpertsError, match=f"`{flag}` got True under tensor parallelism"):
        check_flags(module)
    module._is_expert_parallel = True
    check_flags(module)
