"""Experts outside transformers' interface: how the forward of each class maps onto `moe_mlp`, as a table.

Transformers takes an experts implementation for these models and ignores it. `enable` puts an adapter in the
place of a module's forward, on the instance, and `restore` takes it away. An adapter is not trusted for its
name: before it is put in, it computes a few tokens beside the forward of the class, and the activation is
found as everywhere (`gate`). PEFT and sharding that put another module or tensor in the place of a weight are
seen at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastexperts.activations import Activation
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.bypass import check_called
from fastexperts.hf.compare import check_same, has_data
from fastexperts.hf.gate import activation_of
from fastexperts.hf.inventory import Row, Summary, label_of, outside_modules, related
from fastexperts.hf.plain import check_plain
from fastexperts.ops import moe_mlp
from fastexperts.weights import Weight

WAY_OUT = "Train it without fastexperts, or pass allow_unsupported=True to leave it as it is."
REASONS = {
    "JetMoeMoA": "its experts are the projections of an attention, no MLPs",
    "SwitchTransformersExperts": "a module per expert, with a dropout inside",
    "NllbMoeExperts": "a module per expert, with biases and dropouts inside",
    "DogeCDMoE": "its experts are rows of two embeddings, looked up for each token",
}
"""Why some classes have no adapter; of others it is said that they are not in the interface."""

Moe = Callable[..., Tensor]  # Adapted.moe


@dataclass(frozen=True)
class Adapter:
    """How a class is served.

    forward: takes the place of the class's; its first arguments are the module and `Adapted.moe`.
    weights: the gate and up, and the down projection of a module.
    act: the path of the activation, where the module has no `_apply_gate`.
    holders: path -> class name of the submodules that hold the weights.
    takes_routing: the forward's arguments are tokens, ids and weights; otherwise hidden states alone.
    ids: the attribute that says how many ids there are.
    """

    forward: Callable[..., Any]
    weights: Callable[[Any], tuple[Weight, Weight]]
    act: str = "act_fn"
    holders: Mapping[str, str] = field(default_factory=dict)
    takes_routing: bool = True
    ids: str = "num_experts"


class Adapted:
    """What stands in the place of a module's forward; to `gate`, an experts module with the module's gate.

    An object and no closure: copied and pickled with its module, it knows the copy.
    """

    has_gate = is_concatenated = True

    def __init__(self, module: Any, adapter: Adapter) -> None:
        self.module, self.adapter = module, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for path, cls in self.adapter.holders.items():
            _check_holder(self.module, path, cls)
        return self.adapter.forward(self.module, self.moe, *args, **kwargs)

    def moe(self, x_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor, sentinels: bool = False) -> Tensor:
        """`moe_mlp` with the weights and the activation of the module."""
        w1, w2 = self.adapter.weights(self.module)
        if not torch.compiler.is_compiling():
            check_plain(self.module, "gate and up", w1.w)
            check_plain(self.module, "down", w2.w)
        activation = activation_of(self)
        return moe_mlp(x_TD, ids_TK, weight_TK, w1, w2, activation=activation, expert_parallel=sentinels)

    @property
    def act_fn(self) -> Any:
        return attrgetter(self.adapter.act)(self.module)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def __getattr__(self, name: str) -> Any:  # modules(), named_parameters() and what else `gate` asks for
        if name == "module" or name.startswith("__"):  # asked for while a copy is made
            raise AttributeError(name)
        return getattr(self.module, name)


def _llama4_weights(block: Any) -> tuple[Weight, Weight]:
    experts = block.experts
    return Weight(experts.gate_up_proj, transposed=True), Weight(experts.down_proj, transposed=True)


def _llama4(self: Any, moe: Moe, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Scores scale what goes into an expert: each pair is a token of its own, with one expert of weight 1."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    score_TE, logits_TE = self.router(x_TD)  # 0 for what was not chosen
    score_TK, ids_TK = score_TE.topk(self.top_k, dim=-1)
    x_PD = (x_TD[:, None] * score_TK[..., None]).flatten(0, 1)
    ids_P1 = ids_TK.reshape(-1, 1)
    y_PD = moe(x_PD, ids_P1, torch.ones_like(ids_P1, dtype=x_PD.dtype))
    routed_TD = y_PD.view(*score_TK.shape, x_TD.shape[-1]).sum(1)
    return self.shared_expert(x_TD) + routed_TD, logits_TE


def _dbrx_weights(experts: Any) -> tuple[Weight, Weight]:
    """Gate and up are two parameters and become one operand: a copy, kept for backward."""
    flat = experts.mlp
    w1, v1, w2 = (w.unflatten(0, (experts.num_experts, -1)) for w in (flat.w1, flat.v1, flat.w2))
    return Weight(torch.cat([w1, v1], dim=1)), Weight(w2, transposed=True)


def _dbrx(self: Any, moe: Moe, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    return moe(x_TD, top_k_index, top_k_weights).view(hidden_states.shape[0], -1, x_TD.shape[-1])


def _longcat_flash_weights(experts: Any) -> tuple[Weight, Weight]:
    """Without the rows that the parameter has for experts that compute nothing."""
    return Weight(experts.gate_up_proj[: experts.num_routed_experts]), Weight(experts.down_proj)


def _longcat_flash(
    self: Any, moe: Moe, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Ids past the routed experts give the token itself back: sentinels, and their weights times x."""
    routed, identity_TK = self.num_routed_experts, top_k_index >= self.num_routed_experts
    ids_TK = top_k_index.clamp(max=routed)
    out_TD = moe(hidden_states, ids_TK, top_k_weights, sentinels=True)
    weight_T1 = top_k_weights.where(identity_TK, 0).sum(-1, keepdim=True)
    return out_TD + (hidden_states * weight_T1).to(out_TD.dtype)


def _jetmoe_weights(block: Any) -> tuple[Weight, Weight]:
    return Weight(block.input_linear.weight), Weight(block.output_linear.weight)


def _jetmoe(self: Any, moe: Moe, layer_input: Tensor) -> Tensor:
    """The router gives pairs in the order of their experts: put back in that of their tokens."""
    x_TD = layer_input.reshape(-1, layer_input.shape[-1])
    pair_of_row_P, _, weight_P, rows_of_expert, _ = self.router(x_TD)
    sizes_E = torch.tensor(rows_of_expert, device=x_TD.device)
    expert_P = torch.repeat_interleave(sizes_E, output_size=len(pair_of_row_P))
    row_of_pair_TK = pair_of_row_P.argsort().view(len(x_TD), -1)
    out_TD = moe(x_TD, expert_P[row_of_pair_TK], weight_P[row_of_pair_TK])
    return out_TD.view_as(layer_input) + self.bias


def _step3p7_weights(experts: Any) -> tuple[Weight, Weight]:
    return Weight(experts.gate_up_proj), Weight(experts.down_proj)


def _step3p7(
    self: Any, moe: Moe, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return moe(hidden_states, top_k_index, top_k_weights, sentinels=True)


ADAPTERS: dict[str, Adapter] = {
    "Llama4TextMoe": Adapter(
        _llama4,
        _llama4_weights,
        act="experts.act_fn",
        holders={"experts": "Llama4TextExperts"},
        takes_routing=False,
    ),
    "DbrxExperts": Adapter(_dbrx, _dbrx_weights, act="mlp.activation_fn", holders={"mlp": "DbrxExpertGLU"}),
    "LongcatFlashExperts": Adapter(_longcat_flash, _longcat_flash_weights, ids="total_experts"),
    "JetMoeMoE": Adapter(
        _jetmoe,
        _jetmoe_weights,
        act="activation",
        holders={"input_linear": "JetMoeParallelExperts", "output_linear": "JetMoeParallelExperts"},
        takes_routing=False,
    ),
    "Step3p7Experts": Adapter(_step3p7, _step3p7_weights),
}
"""Class name -> its adapter."""


def rows(model: nn.Module) -> list[Row]:
    """A row for each module outside the interface, those of `model` that have an adapter first."""
    adaptable = {name: module for name, module in model.named_modules() if type(module).__name__ in ADAPTERS}
    others = {
        name: type(module).__name__
        for name, module in outside_modules(model)
        if not any(related(name, other) for other in adaptable)
    }
    not_served = [
        Row(name, cls, served=False, reason=REASONS.get(cls, "not in transformers' experts interface"))
        for name, cls in others.items()
    ]
    return [*(_row(model, name, module) for name, module in adaptable.items()), *not_served]


def _row(model: nn.Module, name: str, module: nn.Module) -> Row:
    cls = type(module).__name__
    try:
        check_called(model, name)
        activation, dims = check_adapted(module)
    except FastexpertsError as e:
        return Row(name, cls, served=False, reason=str(e))
    top_k = getattr(module, "top_k", None)
    return Row(name, cls, True, label_of(activation), dims[0], top_k, *dims[1:])


def check_adapted(module: nn.Module) -> tuple[Activation, torch.Size]:
    """(the activation of `module`, [E, D, F]); raises FastexpertsError if its adapter does not serve it."""
    adapter = ADAPTERS[type(module).__name__]
    if "forward" in vars(module) and not is_switched(module):
        raise _error(
            module,
            "forward",
            got="one put on the instance",
            needs="that of its class",
            way_out="Call enable() before what wraps or patches the module.",
        )
    if not has_data(module):
        raise _error(
            module,
            "weights",
            got="what is on the meta device, sharded or quantised",
            needs="plain data: the adapter is compared with the forward of the class",
            way_out="Call enable() when the model is loaded and before it is sharded.",
        )
    adapted = Adapted(module, adapter)
    dims = adapter.weights(module)[1].out_in.shape
    ids = getattr(module, adapter.ids) if adapter.takes_routing else None
    theirs = partial(type(module).forward, module)
    check_same(module, theirs, adapted, hidden=dims[1], ids=ids, way_out=WAY_OUT)
    return activation_of(adapted), dims


def switch(model: nn.Module, summary: Summary) -> None:
    """Put an adapter in the place of the forward of each module that has one and is served."""
    served = {row.name: ADAPTERS[row.cls] for row in summary.served if row.cls in ADAPTERS}
    for name, adapter in served.items():
        module = model.get_submodule(name)
        vars(module)["forward"] = Adapted(module, adapter)


def is_switched(module: nn.Module) -> bool:
    """Whether an adapter stands in the place of the forward of `module`."""
    return isinstance(vars(module).get("forward"), Adapted)


def restore(model: nn.Module) -> int:
    """Give every switched module of `model` the forward of its class back; returns how many there were."""
    switched = [module for module in model.modules() if is_switched(module)]
    for module in switched:
        del vars(module)["forward"]
    return len(switched)


def _check_holder(module: nn.Module, path: str, cls: str) -> None:
    """Raise where the submodule `path`, read and not called, does more when called: PEFT, hooks, sharding."""
    holder = module.get_submodule(path)
    hooks = (holder._forward_hooks, holder._forward_pre_hooks, holder._backward_hooks)
    found = type(holder).__name__
    if any(hooks) or "forward" in vars(holder):
        found = f"{found} with hooks or a forward of its own"
    if found != cls:
        raise _error(
            module,
            path,
            got=f"a {found}",
            needs=f"the {cls} alone: its weights are read, and it is not called",
            way_out="Adapt or shard the rest alone, or call fastexperts.hf.outside.restore(model).",
        )


def _error(module: nn.Module, argument: str, *, got: str, needs: str, way_out: str) -> FastexpertsError:
    return refuse(type(module).__name__, argument, got=got, needs=needs, way_out=way_out)
