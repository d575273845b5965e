"""A module's forward in which some globals of its file are others, on the instance: nothing process-wide is
patched.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

from fastexperts.hf import liger


class ScopedForward(liger.Forward):
    """The forward of the class, to which the globals named in `others` are those values.

    A second one on a module adds its own to those that are there. Values are hashable and equal where they do
    the same, so that the layers of a model share one function.
    """

    def __init__(self, module: Any, where: str, others: dict[str, Any]) -> None:
        super().__init__(module, where)
        self.others = others
        self.__wrapped__ = _scoped(type(module).forward, tuple(others.items()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(self.module, *args, **kwargs)

    def __str__(self) -> str:
        return ", ".join(map(str, self.others.values()))

    def __getstate__(self) -> dict[str, Any]:
        """All but the function: pickle would look for it by the name of the class's."""
        return {name: value for name, value in vars(self).items() if name != "__wrapped__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__wrapped__ = _scoped(type(self.module).forward, tuple(self.others.items()))

    def put(self) -> None:
        """Take the place, together with the `ScopedForward` that has it."""
        before = vars(self.module).get("forward")
        others = {**before.others, **self.others} if isinstance(before, ScopedForward) else self.others
        vars(self.module)["forward"] = ScopedForward(self.module, self.where, others)


def globals_of(module: Any) -> dict[str, Any]:
    """The globals that the forward of the class of `module` reads, by name."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return {}
    scope = forward.__globals__
    return {name: scope[name] for name in forward.__code__.co_names if name in scope}


@functools.cache
def _scoped(function: FunctionType, others: tuple[tuple[str, Any], ...]) -> FunctionType:
    """`function`, to which the globals named in `others` are those values."""
    scope = {**function.__globals__, **dict(others)}
    # Without a name: torch.compile takes the globals of a named one from the module of that name.
    scope.pop("__name__", None)
    made = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__module__ = function.__kwdefaults__, function.__module__
    return made
