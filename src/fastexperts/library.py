"""Functions as torch.library ops."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastexperts", "FRAGMENT")  # what is registered lives as long as it does


class Op:
    """A function of tensors, numbers and strings as the op fastexperts::NAME.

    What torch.library.custom_op makes of it, without what that costs: its first call imports torch.compile
    (a second or more), and each later one passes through four more Python functions.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"fastexperts::{name}"
        torch.library.define(self.name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(self.name, "CompositeExplicitAutograd", _unseen(function))
        self._packet = getattr(torch.ops.fastexperts, name).default

    def __call__(self, *args: Any) -> Any:
        return self._packet(*args)

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates what gives the shapes of the results."""
        return torch.library.register_fake(self.name, function)

    def differentiable(self, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        """Decorates the derivative, whose forward takes a key set before the arguments of the op, for
        `below_autograd`.

        torch.library.register_autograd does the same, but in each call looks for defaults of arguments in the
        schema, which it reads once for every argument: 60 us, a fifth of a call.
        """

        def call(keys: Any, *args: Any) -> Any:
            asked = torch.is_grad_enabled() and any(
                isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
            )
            return function.apply(keys, *args) if asked else self.below_autograd(keys, *args)

        _LIBRARY.impl(self.name, _unseen(call), "Autograd", with_keyset=True)
        return function

    def below_autograd(self, keys: Any, *args: Any) -> Any:
        """The results, of which autograd notes nothing. keys: of the dispatcher, as it gave them."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._packet.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def no_derivative(self, refusal: Callable[..., None]) -> None:
        """A backward through the op calls `refusal`, which raises."""
        torch.library.register_autograd(self.name, refusal)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    return lambda function: Op(name, function)


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose frames Dynamo does not look into, once somebody has imported it."""

    @functools.cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(function)

    def call(*args: Any) -> Sequence[torch.Tensor]:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*args)

    return call
