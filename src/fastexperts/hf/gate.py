"""Which `Activation` an experts module computes: found by comparing numbers, again when they may change.

Nothing here trusts a name. A module's gate (`_apply_gate`, or `act_fn` where there is no gate) and a row of
`Activation` are evaluated, value and derivative, in fp64 on inputs that reach beyond every clamp. The row
that equals the gate is the one that runs; a gate that no row equals is refused, and so is one that reads a
tensor beside its input: the tensor would get no gradient, and it changes where nothing here can see it.

Legend: P rows, F expert intermediate dim, G = 2F gated, else F.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import product
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastexperts.activations import FUNCTIONS, Activation
from fastexperts.errors import refuse

TOLERANCE = 1e-9
"""Of |row - gate| / (1 + |gate|), both in fp64: another order of operations alone differs by 1e-15."""

WAY_OUT = "Use experts_implementation='grouped_mm' or 'eager' for this model."

_QUICK_GELU_ALPHA = 1.702
_USUAL_LIMITS = (7.0, 10.0)
_OURS = "_fastexperts_"
_ATTRIBUTES = {True: f"{_OURS}checked_gate", False: f"{_OURS}checked_gate_in_eval"}
"""Where a module keeps what holds for it in training, and in eval: runs turn from one to the other often."""
_PLAIN = (int, float, str, type(None), torch.dtype, FunctionType, MethodType)
_EXACTLY_PLAIN = frozenset((bool, *_PLAIN))


@dataclass(frozen=True)
class CheckedGate:
    """The outcome of one comparison, kept on the module, and the state of the module that it holds for."""

    activation: Activation
    state: tuple[Any, ...]

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copied or unpickled module is compared again: identities do not travel


def activation_of(module: Any) -> Activation:
    """The `Activation` that equals the gate of `module`; raises FastexpertsError if there is none.

    The comparison (1.3 ms on a CPU) runs once per module, for training and eval each, and is repeated when
    anything in `_state` has changed. Under torch.compile it runs while tracing, outside the graph, and what
    the gate reads becomes a guard.
    """
    if not torch.compiler.is_compiling():
        return checked_gate(module).activation
    fields = _fields_constant(id(module))
    # The gate is traced on no rows, for the guards alone: when a value that it reads changes, this is
    # compiled, and so compared, again. Nothing uses the result, so it leaves the graph as dead code.
    _gate_function(module)(torch.empty(0, 4))
    return Activation(*fields)


def checked_gate(module: Any) -> CheckedGate:
    """The comparison of `module`, from the module if nothing that it depends on has changed."""
    state, attribute = _state(module), _ATTRIBUTES[module.training]
    checked = module.__dict__.get(attribute)
    if checked is not None and checked.state == state:
        return checked
    # A thread of its own: no dispatch mode, autocast, saved-tensor hook, default device or inference mode of
    # the caller reaches it. Inside a checkpointed forward, what it saves would be counted as the model's.
    with ThreadPoolExecutor(1) as pool:
        activation = pool.submit(find_activation, module).result()
    checked = CheckedGate(activation, state)
    module.__dict__[attribute] = checked
    return checked


@torch.compiler.assume_constant_result
def _fields_constant(address: int) -> tuple[Any, ...]:
    """The fields of the activation of the module that lives there: torch.compile builds an `Activation`, but
    takes none as a constant; and of PyTorch 2.11 no module as an argument of a constant.
    """
    module = ctypes.cast(address, ctypes.py_object).value
    return astuple(checked_gate(module).activation)


def _gate_function(module: Any) -> Callable[[Tensor], Tensor]:
    return module._apply_gate if module.has_gate else module.act_fn


def _state(module: Any) -> tuple[Any, ...]:
    """What the gate can depend on: `act_fn`, and of `module`, its config, `act_fn` and every submodule the
    functions and the plain values, used or not. Not seen: globals, closures, class attributes, other objects.
    """
    act_fn = getattr(module, "act_fn", None)
    owners = [getattr(module, "config", None), *module.modules()]
    if not any(act_fn is owner for owner in owners):
        owners.append(act_fn)
    # Functions and not classes: each forward of a parametrized module (PEFT) makes a class of its own.
    functions = [getattr(type(owner), "forward", None) for owner in owners]
    values = [_plain_attributes(owner) for owner in owners]
    return act_fn, getattr(type(module), "_apply_gate", None), functions, values


def _plain_attributes(owner: Any) -> dict[str, Any]:
    """name -> `_plain` of an attribute of `owner` itself, without what we put there.

    A forward sees about a hundred; most are plain, so no function is called for them.
    """
    return {
        name: value if type(value) in _EXACTLY_PLAIN else _plain(value)
        for name, value in getattr(owner, "__dict__", {}).items()
        if not name.startswith(_OURS)
    }


def _plain(value: Any) -> Any:
    """`value` itself if it is plain, a copy of a container, else its type."""
    kind = type(value)  # not isinstance: it reads `__class__`, which a config makes slow
    if issubclass(kind, dict):
        return {key: _plain(item) for key, item in value.items()}
    if issubclass(kind, (list, tuple)):
        return [_plain(item) for item in value]
    return value if issubclass(kind, _PLAIN) else kind


def find_activation(module: Any) -> Activation:
    """The first candidate row that equals the gate of `module` everywhere on the grid."""
    gated, interleaved = module.has_gate, module.has_gate and not module.is_concatenated
    name = f"{type(module).__name__}.{'_apply_gate' if gated else 'act_fn'}"
    h_PG = _grid(gated, _values_named(module, "limit", "clamp"))
    try:
        a_PF, dh_PG = _value_and_derivative(_gate_function(module), h_PG, 2 if gated else 1, interleaved)
    except _OtherTensorError as e:
        raise refuse(
            "fastexperts",
            name,
            got=f"a gate that reads {_name_of(e.tensor, module)}",
            needs="a function of gate and up alone: a tensor it reads would get no gradient",
            way_out=f"Make it a number if it is a constant. {WAY_OUT}",
        ) from None
    except Exception as e:
        raise refuse(
            "fastexperts",
            name,
            got=f"{type(e).__name__} ({e}) when it was evaluated in fp64 on the CPU",
            needs="an elementwise function of gate and up",
            way_out=WAY_OUT,
        ) from e
    closest: tuple[float, str] | None = None
    for activation in _candidates(module):
        deviation, where = _deviation(activation, h_PG, a_PF, dh_PG)
        if deviation <= TOLERANCE:
            return replace(activation, interleaved=interleaved)
        if closest is None or deviation < closest[0]:
            closest = deviation, f"the closest, {activation}, deviates by {where}"
    raise refuse(
        "fastexperts",
        name,
        got=f"a function that no Activation equals: {closest[1] if closest else 'there is no candidate'}",
        needs=f"values and derivatives within {TOLERANCE} of one",
        way_out=WAY_OUT,
    )


class _OtherTensorError(Exception):
    """The gate reads `tensor`, which is not computed from its input."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _InputAlone(TorchDispatchMode):
    """Raises at the first op that reads a tensor neither computed from `h_PG` nor made inside the context,
    and leaves in fp64 what a gate would round to fp32.
    """

    def __init__(self, h_PG: Tensor) -> None:
        super().__init__()
        self.own = {_storage(h_PG)}  # storages: autograd hands out new tensor objects for its views

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # torch.tensor(...), whose data no op has made
            for tensor in _tensors((args, kwargs)):
                if _storage(tensor) not in self.own:
                    raise _OtherTensorError(tensor)
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": args[0].dtype}
        out = func(*args, **kwargs)
        self.own.update(map(_storage, _tensors(out)))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _name_of(tensor: Tensor, module: Any) -> str:
    """The parameter or buffer of `module` that `tensor` is, in words."""
    for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, candidate in named:
            if _storage(candidate) == _storage(tensor):
                return f"the {kind} {name}"
    return f"a tensor {list(tensor.shape)} that is no parameter of the module"


def _candidates(module: Any) -> Iterator[Activation]:
    limits = [value for value in _values_named(module, "limit", "clamp") if value > 0]
    alphas = [1.0, *_values_named(module, "alpha"), _QUICK_GELU_ALPHA]
    shifts = (0.0, 1.0) if module.has_gate else (0.0,)
    for fn, alpha, limit, shift in product(FUNCTIONS, dict.fromkeys(alphas), [math.inf, *limits], shifts):
        if alpha == 1.0 or fn == "silu":
            yield Activation(fn, module.has_gate, alpha, limit, shift)
    caps = [value for part in module.modules() for value in _values_named(part, "cap") if value > 0]
    if module.has_gate:
        for gate_cap, up_cap in product(dict.fromkeys(caps), repeat=2):
            yield Activation("silu", gate_cap=gate_cap, up_cap=up_cap)


def _values_named(module: Any, *parts: str) -> list[float]:
    return [
        float(value)
        for name, value in vars(module).items()
        if any(part in name for part in parts)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    ]


def _grid(gated: bool, limits: list[float]) -> Tensor:
    """h_PG in fp64: for a gated module every gate value (a row each) against every up value."""
    near = [scale * limit for limit in (*_USUAL_LIMITS, *limits) for scale in (1 - 1e-3, 1, 1 + 1e-3, 2)]
    positive = torch.tensor([1e-3, *near, 64.0, 256.0, 1000.0], dtype=torch.float64)
    dense = torch.linspace(-30, 30, 61, dtype=torch.float64)  # the integers: clamps and kinks lie on them
    fine = torch.linspace(-3.013, 3.019, 41, dtype=torch.float64)
    values_F = torch.cat([dense, fine, positive, -positive]).unique()
    if not gated:
        return values_F[None]
    gate_PF = values_F[:, None].expand(-1, values_F.numel())
    return torch.cat([gate_PF, values_F.expand_as(gate_PF)], dim=1)


def _value_and_derivative(
    function: Callable[[Tensor], Tensor], h_PG: Tensor, parts: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """(a_PF, dh_PG) of an elementwise `function` of h alone, which it reads interleaved if it says so."""
    h_PG = h_PG.clone().requires_grad_()
    stored_PG = torch.stack(h_PG.chunk(2, dim=1), dim=-1).flatten(1) if interleaved else h_PG
    with _InputAlone(stored_PG):
        a_PF = function(stored_PG)
    if a_PF.shape != (h_PG.shape[0], h_PG.shape[1] // parts):
        raise ValueError(f"shape {list(a_PF.shape)} from {list(h_PG.shape)}")
    (dh_PG,) = torch.autograd.grad(a_PF.sum(), h_PG)
    return a_PF.detach(), dh_PG


def _deviation(activation: Activation, h_PG: Tensor, a_PF: Tensor, dh_PG: Tensor) -> tuple[float, str]:
    """The largest deviation of `activation` from (a, dh), and where it is, in words."""
    mine_PF, dmine_PG = activation.vjp(h_PG, torch.ones_like(a_PF))
    worst = -1.0, ""
    for what, mine, other in (("value", mine_PF, a_PF), ("derivative", dmine_PG, dh_PG)):
        deviation = ((mine - other).abs() / (1 + other.abs())).nan_to_num(math.inf, math.inf)
        row, column = divmod(int(deviation.argmax()), deviation.shape[1])
        largest = deviation[row, column].item()
        if largest > worst[0]:
            dim_f = a_PF.shape[1]
            inputs = [f"{h_PG[row, i].item():g}" for i in range(column % dim_f, h_PG.shape[1], dim_f)]
            at = ", ".join(f"{part} {value}" for part, value in zip(("gate", "up"), inputs, strict=False))
            gap = abs(mine[row, column].item() - other[row, column].item())
            worst = largest, f"{gap:.3g} ({what}) at {at if activation.gated else f'input {inputs[0]}'}"
    return worst
