"""The adapter between transformers' experts interface and `moe_mlp`: `register`, `enable`, and the forward.

Every flag of the interface is honoured or refused; nothing is guessed from a class name.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from fastexperts.activations import Activation
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import outside, peft
from fastexperts.hf.bypass import check_reached, eager_of
from fastexperts.hf.compare import check_same, has_data
from fastexperts.hf.gate import WAY_OUT, activation_of
from fastexperts.hf.inventory import (
    Row,
    Summary,
    interface_modules,
    label_of,
    row_of,
    stored,
)
from fastexperts.hf.plain import check_kind, check_plain
from fastexperts.ops import moe_mlp
from fastexperts.weights import Weight

NAME = "fastexperts"
OLDEST = {"torch": "2.11", "transformers": "5.17"}


def register() -> None:
    """Make `experts_implementation="fastexperts"` valid wherever transformers takes one; idempotent.

    That is `from_pretrained`, `from_config`, `set_experts_implementation` and TRL's `model_init_kwargs`.
    PEFT's adapters on the experts of such a model run without a folded weight from then on.
    Raises FastexpertsError if torch or transformers is missing or older than we serve.
    """
    for package, oldest in OLDEST.items():
        _check_version(package, oldest)
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, fp8_experts_forward)
    peft.install(NAME)


def enable(model: nn.Module, *, allow_unsupported: bool = False, verbose: bool = True) -> Summary:
    """Switch the experts of a loaded `model` to fastexperts and say what was switched, what not, and why.

    Args:
        model: a transformers model, or a wrapper of one (PEFT, DistributedDataParallel, torch.compile).
        allow_unsupported: let modules that cannot be served stay on their present implementation; otherwise
            they raise FastexpertsError and nothing is switched.
        verbose: print the summary.

    Transformers selects the implementation per config, so a module that shares its config with one that
    cannot be served stays as well, and its row says so. Modules outside its interface that have an adapter
    (`hf.outside`) get another forward, which `hf.outside.restore` takes away.
    """
    summary = survey(model)
    _check_switchable(model, summary, allow_unsupported)
    switch(model, summary)
    if verbose:
        print(summary)
    return summary


def survey(model: nn.Module) -> Summary:
    """What `enable` can switch of `model`, what not, and why; nothing is switched.

    Raises FastexpertsError as `register` does, and for what is no transformers model.
    """
    register()
    pretrained_models(model, "enable")
    modules = interface_modules(model)
    rows = {name: _row(model, name, module) for name, module in modules.items()}
    unswitchable = {id(modules[name].config): row for name, row in rows.items() if not row.served}
    for name, row in rows.items():
        culprit = unswitchable.get(id(modules[name].config))
        if row.served and culprit is not None:
            reason = f"shares its config with {culprit.name}, which is not served"
            rows[name] = row_of(name, modules[name], served=False, activation=row.activation, reason=reason)
    return Summary((*rows.values(), *outside.rows(model)))


def switch(model: nn.Module, summary: Summary) -> None:
    """Switch what `summary`, which `survey` made of `model`, says is served; the rest stays as it is."""
    modules = interface_modules(model)
    before = {
        id(module.config): (module.config, module.config._experts_implementation)
        for module in modules.values()
    }
    served = {id(modules[row.name].config) for row in summary.served if row.name in modules}
    for root in pretrained_models(model, "enable"):
        root.set_experts_implementation(NAME)
    for key, (config, previous) in before.items():
        # Transformers sets the configs of models it knows by their source; what a module reads decides.
        wanted = NAME if key in served else previous
        if config._experts_implementation != wanted:
            config._experts_implementation = wanted
    outside.switch(model, summary)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function that transformers calls as an experts module's forward: [N, D], [N, K], [N, K] -> [N, D].

    Products run in the autocast dtype where autocast is on, else in that of `hidden_states`, whose dtype the
    output has. Raises FastexpertsError for a flag, a gate or a weight that cannot be served.
    """
    w1_name, w2_name = _weight_names(self)
    if not torch.compiler.is_compiling():
        check_flags(self)
        for name in (w1_name, w2_name, *((w1_name + "_bias", w2_name + "_bias") if self.has_bias else ())):
            check_plain(self, name, getattr(self, name))
    w1, w2 = _weight(self, w1_name), _weight(self, w2_name)
    activation = activation_of(self)
    # transformers < 5.23 does not say, and sends the same sentinels.
    expert_parallel = getattr(self, "_is_expert_parallel", True)
    if not getattr(self, "has_post_expert_norm", False):
        return moe_mlp(
            hidden_states,
            top_k_index,
            top_k_weights,
            w1,
            w2,
            activation=activation,
            expert_parallel=expert_parallel,
        )
    # The norm comes between an expert and its weight: every pair is a token of its own, with one expert.
    x_PD = hidden_states.repeat_interleave(top_k_index.shape[1], dim=0)
    ids_P1, weight_P1 = top_k_index.reshape(-1, 1), top_k_weights.reshape(-1, 1)
    ones_P1 = torch.ones_like(weight_P1)
    y_PD = moe_mlp(x_PD, ids_P1, ones_P1, w1, w2, activation=activation, expert_parallel=expert_parallel)
    y_PD = self.post_expert_norm(y_PD) * weight_P1
    return y_PD.unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def _weight(module: Any, name: str) -> Weight:
    """The projection `name` of an experts module, with its bias and what adapters add to it."""
    bias = getattr(module, name + "_bias") if module.has_bias else None
    return Weight(getattr(module, name), module.is_transposed, bias, peft.take_update(module, name))


def fp8_experts_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What is registered for FP8 checkpoints: a refusal, where transformers would raise a bare KeyError."""
    raise _fp8_refusal(self)


_FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}


def check_flags(module: Any) -> None:
    """Raise FastexpertsError for a flag of the interface that this version does not know, or not under
    tensor parallelism.
    """
    for flag in _new_flags():
        if getattr(module, flag, False):
            raise refuse(
                type(module).__name__,
                flag,
                got=True,
                needs=f"False: it came with a newer transformers and is none of {', '.join(sorted(_FLAGS))}",
                way_out=WAY_OUT,
            )
    for flag, what in (("has_bias", "the down bias"), ("has_post_expert_norm", "the norm after each expert")):
        if getattr(module, flag, False) and _is_tensor_parallel(module):
            raise refuse(
                type(module).__name__,
                flag,
                got="True under tensor parallelism",
                needs=f"experts that are whole: each rank would apply {what}, before the sum over ranks",
                way_out="Leave these experts out of tp_plan, as transformers does, or shard them by ep_size.",
            )


def _is_tensor_parallel(module: Any) -> bool:
    """Whether ranks hold slices of the same experts, and transformers sums what they return."""
    # transformers < 5.23 does not say which of the two sharded a module.
    return getattr(module, "_is_hooked", False) and not getattr(module, "_is_expert_parallel", True)


@functools.cache
def _new_flags() -> tuple[str, ...]:
    """The flags of transformers' decorator that are none of ours."""
    from transformers.integrations.moe import use_experts_implementation

    flags = inspect.signature(use_experts_implementation).parameters
    return tuple(flag for flag in flags if flag.startswith(("is_", "has_")) and flag not in _FLAGS)


def check_served(module: Any) -> Activation:
    """The activation that `module` will run; raises FastexpertsError if it cannot be served."""
    if "FP8" in type(module).__name__:
        raise _fp8_refusal(module)
    check_flags(module)
    for name in _weight_names(module):
        if not stored(module, name):
            raise refuse(
                type(module).__name__,
                name,
                got="no such parameter",
                needs="the experts' weights in it, [experts, out, in]",
                way_out=WAY_OUT,
            )
        parameter = module._parameters.get(name)
        if parameter is not None:  # what a parametrization makes of its own is seen at the call
            check_kind(module, name, parameter)
    return activation_of(module)


def _weight_names(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _fp8_refusal(module: Any) -> FastexpertsError:
    return refuse(
        type(module).__name__,
        "experts_implementation",
        got=f"'{NAME}' for FP8 experts",
        needs="experts in bf16, fp16 or fp32",
        way_out="Load with quantization_config=FineGrainedFP8Config(dequantize=True), or use 'grouped_mm'.",
    )


def _row(model: nn.Module, name: str, module: Any) -> Row:
    try:
        activation = check_served(module)
        check_reached(model, name, module)
        _check_eager(module)
    except FastexpertsError as e:
        return row_of(name, module, served=False, reason=str(e))
    return row_of(name, module, served=True, activation=label_of(activation))


def _check_eager(module: Any) -> None:
    """Raise unless `experts_forward` computes what the class computes by itself, where its data are here."""
    eager = eager_of(module)
    if eager is None or not has_data(module):
        return
    down = module.down_proj
    check_same(
        module,
        functools.partial(eager, module),
        functools.partial(experts_forward, module),
        hidden=down.shape[2 if module.is_transposed else 1],
        ids=down.shape[0],
        way_out=WAY_OUT,
    )


def _check_switchable(model: nn.Module, summary: Summary, allow_unsupported: bool) -> None:
    """Raise unless something can be switched and all that cannot is allowed to stay."""
    if not summary.rows:
        raise refuse(
            "enable",
            "model",
            got=f"{type(model).__name__}, in which no experts were found",
            needs="a mixture-of-experts model",
            way_out="Train a dense model without fastexperts.",
        )
    if not summary.served:
        raise refuse(
            "enable",
            "model",
            got=f"{type(model).__name__}, none of whose experts can be served",
            needs="experts that transformers dispatches and fastexperts serves",
            way_out=f"Train it without fastexperts. Found:\n{summary.reasons()}",
        )
    if summary.not_served and not allow_unsupported:
        raise refuse(
            "enable",
            "model",
            got=f"{type(model).__name__} with {len(summary.not_served)} modules that cannot be served",
            needs="all experts to be served",
            way_out=f"Pass allow_unsupported=True to leave these as they are:\n{summary.reasons()}",
        )


def pretrained_models(model: object, where: str) -> list[Any]:
    """The topmost transformers models in `model`; raises FastexpertsError for `where` if there is none."""
    from transformers import PreTrainedModel

    found: dict[str, Any] = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        covered = any(not top or name.startswith(f"{top}.") for top in found)
        if isinstance(module, PreTrainedModel) and not covered:
            found[name] = module
    if not found:
        raise refuse(
            where,
            "model",
            got=type(model).__name__,
            needs="a transformers PreTrainedModel, or a wrapper of one",
            way_out="Load it with AutoModelForCausalLM.from_pretrained.",
        )
    return list(found.values())


def _check_version(package: str, oldest: str) -> None:
    try:
        found = import_module(package).__version__
    except ImportError as e:
        try:
            reason = f"{version(package)}, which cannot be imported ({e})"
        except PackageNotFoundError:
            reason = "none"
        raise refuse(
            "register", package, got=reason, needs=f"{package} >= {oldest}", way_out=_upgrade(package, oldest)
        ) from e
    if _numbers(found) < _numbers(oldest):
        raise refuse(
            "register", package, got=found, needs=f"{package} >= {oldest}", way_out=_upgrade(package, oldest)
        )


def _upgrade(package: str, oldest: str) -> str:
    return f"Install it with: pip install '{package}>={oldest}'."


def _numbers(release: str) -> tuple[int, ...]:
    """(major, minor) of a version such as 2.13.0+cpu or 5.17.0.dev0."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
