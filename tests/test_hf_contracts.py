"""What transformers' interface asks for: parallel experts, meta tensors, dtypes, widths, wrappers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from support_hf import (
    Ops,
    assert_close,
    layer_inputs,
    outputs_and_gradients,
    relative,
    rescale,
    tiny_config,
    tiny_model,
    tokens,
    toy_experts,
)
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.moe import batched_mm_experts_forward

import fastexperts

EXPERTS, RANKS = 6, 3


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()


class SplitExperts(nn.Module):
    """The experts of a module on `RANKS` ranks, all of them here; `way`: how they get tokens."""

    def __init__(self, whole: Any, way: str) -> None:
        super().__init__()
        self.whole, self.local, self.way = whole, EXPERTS // RANKS, way

    def rank(self, r: int) -> Any:
        module = toy_experts(experts=self.local)
        module._is_expert_parallel = True
        for name, parameter in self.whole.named_parameters():
            del module._parameters[name]
            setattr(module, name, parameter.split(self.local)[r])
        return module

    def forward(self, x_TD, ids_TK, weight_TK):
        return getattr(self, self.way)(x_TD, ids_TK, weight_TK)

    def all_reduce(self, x_TD, ids_TK, weight_TK):
        """Every rank sees every token; what is elsewhere has the id `local` and the weight 0."""
        parts = []
        for r in range(RANKS):
            elsewhere = ids_TK // self.local != r
            ids = torch.where(elsewhere, self.local, ids_TK % self.local)
            parts.append(self.rank(r)(x_TD, ids, weight_TK.masked_fill(elsewhere, 0.0)))
        return sum(parts)

    def all_to_all(self, x_TD, ids_TK, weight_TK):
        """Every rank sees the pairs of its experts, K = 1 with unit weights; the sender weighs."""
        order = ids_TK.flatten().argsort()
        rows = x_TD[order // ids_TK.shape[1]]
        counts = torch.bincount(ids_TK.flatten() // self.local, minlength=RANKS).tolist()
        sent = zip(rows.split(counts), ids_TK.flatten()[order].split(counts), strict=True)
        back = []
        for r, (x_PD, ids_P) in enumerate(sent):
            ids_P1 = ids_P[:, None] % self.local
            back.append(self.rank(r)(x_PD, ids_P1, torch.ones_like(ids_P1, dtype=x_PD.dtype)))
        y_PD = torch.empty_like(rows).index_put((order,), torch.cat(back))
        return (y_PD.view(*ids_TK.shape, -1) * weight_TK[..., None]).sum(1)


@pytest.mark.parametrize("routing", ["random", "one rank is idle"])
@pytest.mark.parametrize("way", ["all_reduce", "all_to_all"])
def test_experts_on_several_ranks_are_those_of_one(way, routing):
    whole = toy_experts(experts=EXPERTS)
    x_TD, ids_TK, weight_TK = layer_inputs(whole, top_k=3)
    if routing == "one rank is idle":
        ids_TK = torch.rand(33, 4).topk(3).indices
    inputs = (x_TD, ids_TK, weight_TK)
    with Ops() as ops:
        got = outputs_and_gradients(SplitExperts(whole, way), whole, inputs)
    wanted = outputs_and_gradients(lambda *args: batched_mm_experts_forward(whole, *args), whole, inputs)
    assert ops.names.count("fastexperts::moe_mlp") == RANKS
    assert_close(got, wanted)


def test_an_idle_rank_stays_connected_to_backward():
    """Transformers sends one row and drops it: FSDP waits for the gradients of every rank."""
    module = toy_experts(experts=2)
    module._is_expert_parallel = True
    x_TD = torch.randn(0, 16, requires_grad=True)
    ids_T1, weight_T1 = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    out = module(x_TD.sum(dim=0, keepdim=True), ids_T1, weight_T1)[:0]
    assert out.shape == (0, 16)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def interleaved(self, gate_up):
    return nnf.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"is_transposed": True},
        {"is_concatenated": False, "is_transposed": True, "gate": interleaved},
        {"has_gate": False},
    ],
)
@pytest.mark.parametrize("length", [0, 7])
def test_a_forward_on_the_meta_device_gives_shapes(flags, length):
    with torch.device("meta"):
        module = toy_experts(**flags).bfloat16()
        x_TD = torch.randn(length, 16, dtype=torch.bfloat16, requires_grad=True)
        weight_TK = torch.rand(length, 2, requires_grad=True)
        out = module(x_TD, torch.zeros(length, 2, dtype=torch.long), weight_TK)
        out.sum().backward()
    assert (out.device.type, out.shape, out.dtype) == ("meta", (length, 16), torch.bfloat16)
    assert weight_TK.grad.dtype == torch.float32
    for tensor in (x_TD, weight_TK, *module.parameters()):
        assert (tensor.grad.device.type, tensor.grad.shape) == ("meta", tensor.shape)


def test_routing_weights_stay_fp32_beside_bf16_tokens():
    """Routers like that of deepseek_v3 give them; rounding them to bf16 would cost 2^-9 of each."""
    torch.manual_seed(0)
    exact = toy_experts(hidden=64, intermediate=48).double()
    x_TD, ids_TK, weight_TK = layer_inputs(exact, tokens=129)
    module = toy_experts(hidden=64, intermediate=48)
    module.load_state_dict(exact.state_dict())
    module.bfloat16()
    inputs = (x_TD.detach().bfloat16().requires_grad_(), ids_TK, weight_TK)
    exact.load_state_dict(module.state_dict())
    inputs64 = (
        inputs[0].detach().double().requires_grad_(),
        ids_TK,
        weight_TK.detach().double().requires_grad_(),
    )
    got = outputs_and_gradients(module, module, inputs)
    eager = outputs_and_gradients(lambda *args: batched_mm_experts_forward(module, *args), module, inputs)
    wanted = outputs_and_gradients(lambda *args: batched_mm_experts_forward(exact, *args), exact, inputs64)
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: torch.float32 if name == "weight" else torch.bfloat16 for name in got
    }
    for name, tensor in wanted.items():
        floor = 2**-8 if name == "weight" else 2**-9
        assert relative(got[name], tensor) <= 2 * max(relative(eager[name], tensor), floor), name

    one = torch.ones_like(weight_TK)
    above = one + 2**-12  # bf16 rounds it to 1
    ours = [module(inputs[0], ids_TK, weight).detach() for weight in (one, above)]
    assert not torch.equal(*ours), "some of the sums round otherwise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtypes_of_eager(dtype):
    """Hidden states of either dtype over fp32 parameters."""
    module = toy_experts()
    x_TD, ids_TK, weight_TK = layer_inputs(module)
    inputs = (x_TD.detach().to(dtype).requires_grad_(), ids_TK, weight_TK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(module, module, inputs)
    assert got.pop("out").dtype == got["x"].dtype == dtype
    assert all(tensor.dtype == torch.float32 for name, tensor in got.items() if name != "x")
    exact = outputs_and_gradients(module, module, (x_TD, ids_TK, weight_TK))
    assert all(2**-14 < relative(tensor, exact[name]) < 0.05 for name, tensor in got.items())


@pytest.mark.parametrize("latent", [None, 12])
def test_experts_of_another_width_than_the_model(latent):
    """nemotron_h computes its experts in a latent space; without one the config's width is theirs."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    values = {
        "hidden_size": 32,
        "moe_latent_size": latent,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    got = {}
    for implementation in ("eager", "fastexperts"):
        config = CONFIG_MAPPING["nemotron_h"](**values)
        config._experts_implementation = implementation
        block = NemotronHMoE(config)
        rescale(block)
        assert block.experts.down_proj.shape == (6, latent or 32, 16)
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with Ops() as ops:
            out = block(x)
        out.square().sum().backward()
        assert ("fastexperts::moe_mlp" in ops.names) == (implementation == "fastexperts")
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        got[implementation] = {"out": out.detach(), "x": x.grad, **gradients}
    assert any("experts.up_proj" in name for name in got["eager"])
    assert_close(got["fastexperts"], got["eager"])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "ernie4_5_moe"])
def test_prefill_and_decode_after_a_step_are_those_of_eager(family):
    """One step of training, then generation: every token, and the logits it was taken from."""
    prompt, runs = tokens(length=6), []
    for implementation in ("eager", "fastexperts"):
        model = tiny_model(family, implementation).train()
        model(tokens(), labels=tokens()).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with Ops() as ops:
            runs.append(
                model.eval().generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=8,
                    min_new_tokens=8,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
        layers = sum(name.endswith("experts.down_proj") for name, _ in model.named_parameters())
        assert ops.names.count("fastexperts::moe_mlp") == (
            8 * layers if implementation == "fastexperts" else 0
        )
    eager, ours = runs
    assert torch.equal(ours.sequences, eager.sequences)
    assert relative(torch.stack(ours.logits), torch.stack(eager.logits)) <= 1e-5


TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}


# family -> (text config, vision config, experts modules, those that text alone reaches)
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "qwen3_vl_moe": (
        {"num_experts": 4, "rope_parameters": rope(2, 1, 1)},
        {**VISION, "deepstack_visual_indexes": [0]},
        2,
        2,
    ),
    "glm4v_moe": (
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "rope_parameters": {**rope(2, 1, 1), "partial_rotary_factor": 1.0},
        },
        {**VISION, "patch_size": 4, "image_size": 8},
        1,
        1,
    ),
    "ernie4_5_vl_moe": (
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [16, 12],
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": rope(1, 1, 2),
        },
        {**VISION, "patch_size": 4},
        2,  # one for text and one, of another width, for images
        1,
    ),
    "minimax_m3_vl": (
        {"num_local_experts": 4, "shared_intermediate_size": 16, "swiglu_limit": 1.25},
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4},
        2,
        2,
    ),
}


def wrapper(family: str, implementation: Any) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    text, vision, *_ = WRAPPERS[family]
    config = CONFIG_MAPPING[family](text_config={**TEXT, **text}, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(
        config, experts_implementation=implementation, dtype=torch.float32
    )
    rescale(model)
    return model.train()


def implementations(model: Any) -> set[str]:
    modules = (m for m in model.modules() if hasattr(m, "is_concatenated"))
    return {m.config._experts_implementation for m in modules}


def outputs(model: Any) -> dict[str, torch.Tensor]:
    ids = tokens()
    logits = model(input_ids=ids, use_cache=False).logits
    nnf.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Experts for images that no token reaches: eager gives zeros where it indexes them, or nothing.
    return {"logits": logits.detach(), **{name: g for name, g in gradients.items() if g.any()}}


@pytest.mark.parametrize("how", ["enable", "from_config", "from_config by sub-config", "set by sub-config"])
@pytest.mark.parametrize("family", WRAPPERS)
def test_experts_inside_a_vision_language_wrapper(family, how):
    *_, modules, reached = WRAPPERS[family]
    named = {"text_config": "fastexperts"}
    asked = {"from_config": "fastexperts", "from_config by sub-config": named}.get(how, "eager")
    ours = wrapper(family, asked)
    if how == "enable":
        assert len(fastexperts.enable(ours, verbose=False).served) == modules
    elif how == "set by sub-config":
        assert implementations(ours) == {"eager"}
        ours.set_experts_implementation(named)
    assert implementations(ours) == {"fastexperts"}
    assert len(fastexperts.enable(ours, verbose=False).served) == modules, "what is set already stays so"
    with Ops() as ops:
        got = outputs(ours)
    assert ops.names.count("fastexperts::moe_mlp") == reached
    wanted = outputs(wrapper(family, "eager"))
    assert any("experts.down_proj" in name for name in wanted)
    assert_close(got, wanted)


def test_only_the_sub_config_that_was_named_is_switched():
    model = wrapper("qwen3_vl_moe", {"text_config": "fastexperts", "vision_config": "eager"})
    assert model.config.text_config._experts_implementation == "fastexperts"
    assert model.config.vision_config._experts_implementation == "eager"


def test_a_wrapper_generates_as_eager_does():
    prompt, written = tokens(length=6), []
    for implementation in ("eager", "fastexperts"):
        model = wrapper("qwen3_vl_moe", implementation).eval()
        written.append(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False))
    assert torch.equal(*written)


def test_a_model_built_on_the_meta_device_trains_when_it_is_filled():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            tiny_config("mixtral"), experts_implementation="eager", dtype=torch.float32
        )
    fastexperts.enable(model, verbose=False)
    filled = tiny_model("mixtral", "eager").train()
    model.load_state_dict(filled.state_dict(), assign=True)
    model.model.rotary_emb = filled.model.rotary_emb  # its buffers are in no state dict
    wanted, got = outputs(filled), outputs(model.train())
    assert implementations(model) == {"fastexperts"}
    assert_close(got, wanted)
