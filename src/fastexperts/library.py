"""Functions as torch.library ops."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch


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

    def below_autograd(self, *args: Any) -> Any:
        """The results, of which autograd notes nothing."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._packet(*args)

    def differentiable(self, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        """Decorates the derivative: takes the arguments of the op, and calls `below_autograd` in its forward.

        As torch.library.register_autograd does it, which in each call looks for defaults of arguments in a
        schema that it reads once for every argument: 60 us, a fifth of a call.
        """

        def call(*args: Any) -> Any:
            asked = torch.is_grad_enabled() and any(
                isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
            )
            return function.apply(*args) if asked else self.below_autograd(*args)

        torch.library.impl(self.name, "Autograd", _unseen(call))
        return function

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
