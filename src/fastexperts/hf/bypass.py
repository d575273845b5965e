"""What keeps our function from running where transformers would dispatch to it: a forward put in its way.

Transformers dispatches inside the forward of an experts module, which its block calls. A hub kernel
(`use_kernels=True`), a patched class or a patched instance that computes the experts by itself leaves both
standing and never gets there, and nothing says so. Read from the code of the forwards: nothing is run.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from fastexperts.errors import refuse
from fastexperts.hf.gate import WAY_OUT

_FUNCTIONS = (FunctionType, MethodType, partial)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Attributes under which a wrapper of a module (PEFT, checkpointing, torch.compile, FSDP) holds it.
_WRAPPED = {"base_layer", "_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"}


def check_reached(model: nn.Module, name: str, module: Any) -> None:
    """Raise FastexpertsError unless the forward of `module`, `name` in `model`, dispatches and is called."""
    _check_dispatches(module)
    check_called(model, name)


def _check_dispatches(module: Any) -> None:
    forward = _forward_of(module)
    if not any(_dispatches(layer) for layer in _layers(forward)):
        raise refuse(
            type(module).__name__,
            "forward",
            got=f"{_label(forward)}, which does not ask transformers for an experts implementation",
            needs="the forward that the class has, or a wrapper of it",
            way_out=f"Take the patch away. {WAY_OUT}",
        )


def check_called(model: nn.Module, name: str) -> None:
    """Raise FastexpertsError unless the block around the module `name` of `model` calls it, now and later."""
    block, attribute = _block_of(model, name)
    if block is None:
        return
    forward = _forward_of(block)
    if not _calls(block, forward, attribute):
        raise refuse(
            type(block).__name__,
            "forward",
            got=f"{_label(forward)}, which never calls self.{attribute}(...)",
            needs="a block that calls its experts: they are computed elsewhere, past every implementation",
            way_out="Load the model without use_kernels and without a patch of the block.",
        )
    # Kernels of the hub are put in again at each change between train() and eval().
    for owner in (block, model.get_submodule(name)):
        if hasattr(type(owner), "kernel_layer_name") and _uses_kernels(model):
            raise refuse(
                type(owner).__name__,
                "use_kernels",
                got="True, and a kernel of the hub may replace the forward",
                needs="False",
                way_out="Load the model without use_kernels: a loaded one cannot be freed of them.",
            )


def eager_of(module: Any) -> Any:
    """The forward that the class of `module` had before transformers' decorator, or None without one."""
    dispatching = (layer for layer in _layers(type(module).forward) if _dispatches(layer))
    return getattr(next(dispatching, None), "__wrapped__", None)


def _forward_of(module: Any) -> Any:
    return module.__dict__.get("forward", type(module).forward)


def _layers(forward: Any) -> Iterator[Any]:
    """`forward` and the functions that it wraps or holds, such as the forward whose place it has taken."""
    pending, seen = [forward], set()
    while pending:
        function = pending.pop()
        function = getattr(function, "__func__", function)
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        # functools.wraps, functools.partial, and closures: transformers' expert parallelism is one
        pending += [getattr(function, name, None) for name in ("__wrapped__", "func")]
        for cell in getattr(function, "__closure__", None) or ():
            try:
                held = cell.cell_contents
            except ValueError:  # empty
                continue
            pending += [held] if isinstance(held, _FUNCTIONS) else _methods_held(held)


def _methods_held(held: Any) -> list[Any]:
    return [value for value in getattr(held, "__dict__", {}).values() if isinstance(value, MethodType)]


def _dispatches(function: Any) -> bool:
    """Whether `function` is the forward that transformers' decorator makes around a class's own."""
    code = getattr(function, "__code__", None)
    where = getattr(function, "__globals__", {}).get("__name__")
    made_there = where == "transformers.integrations.moe"
    return code is not None and made_there and "original_forward" in code.co_freevars


def _block_of(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module whose forward has to call the module `name`, and the attribute that it calls it by; None
    where there is none, or a container, whose items no code names.
    """
    path = ["", *name.split(".")]
    while path[-1] in _WRAPPED:
        path.pop()
    *parent, attribute = path
    block = model.get_submodule(".".join(parent[1:]))
    return (None if not attribute or isinstance(block, _CONTAINERS) else block), attribute


def _calls(block: Any, forward: Any, attribute: str) -> bool:
    """Whether `forward`, or a method of `block` that it uses, has the call `self.<attribute>(...)`."""
    pending, seen = list(_layers(forward)), set()
    while pending:
        for code in _codes(getattr(pending.pop(), "__code__", None)):
            if code in seen:
                continue
            seen.add(code)
            if _has_call(code, attribute):
                return True
            pending += [layer for method in _methods(block, code) for layer in _layers(method)]
    return False


def _methods(block: Any, code: CodeType) -> list[Any]:
    """The methods of the class of `block` that `code` can use, the forward of its bases with super()."""
    cls = type(block)
    own = [getattr(cls, name, None) for name in code.co_names if not hasattr(nn.Module, name)]
    if {"super", "forward"} <= set(code.co_names):
        own += [base.__dict__.get("forward") for base in cls.__mro__[1:]]
    return [method for method in own if callable(method)]


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """`code` and that of the functions defined in it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _has_call(code: CodeType, attribute: str) -> bool:
    """Whether `code` calls `.<attribute>(...)` or `.<attribute>.forward(...)`; a mere read does not count."""
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.argval != attribute or step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            continue
        following = steps[i + 1] if i + 1 < len(steps) else None
        if step.opname == "LOAD_METHOD" or "NULL" in step.argrepr:
            return True
        # with *args: a NULL is pushed before the object up to Python 3.12, after the attribute since
        if following and (following.opname == "PUSH_NULL" or following.argval == "forward"):
            return True
        if i > 1 and steps[i - 2].opname == "PUSH_NULL":
            return True
    return False


def _uses_kernels(model: nn.Module) -> bool:
    return any(getattr(module, "_use_kernels", False) is True for module in model.modules())


def _label(forward: Any) -> str:
    function = getattr(forward, "__func__", forward)
    where = getattr(function, "__module__", None) or type(function).__module__
    return f"{where}.{getattr(function, '__qualname__', type(function).__name__)}"
