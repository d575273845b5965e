"""Layers whose backward does not read what their experts gave: computed again, they need no w2, no combine.

Most decoder layers add that output to the residual stream and keep nothing of it. Whether one does is seen,
not guessed: the model runs on a few tokens with NaN in the place of each experts' output, and a layer that
keeps a NaN for its backward is left out. Should anything read the output after all, its gradient is NaN.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastexperts import ops
from fastexperts.hf.compare import has_data

TOKENS = 4


class _Kept(ops.ResultsThrough):
    """Keeps of our layers the rows of updates and their routing, a few numbers of each pair: computed again,
    the rows would need all of x and a once more, and another routing would give them to other pairs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[ops.Results] = []

    def through(self, op: str, compute: Callable[..., ops.Results]) -> ops.Results:
        results = compute()
        self.kept.append(tuple(tensor.detach() for tensor in results[ops.AGAIN]))
        return results


class _Unread(ops.ResultsThrough):
    """Our layers give NaN as their output, and all that their own backward needs, from what was `kept`."""

    def __init__(self, kept: Sequence[ops.Results] = ()) -> None:
        super().__init__()
        self._kept = kept
        self._next: Iterator[ops.Results] = iter(())

    def __enter__(self) -> None:
        self._next = iter(self._kept)
        super().__enter__()

    def through(self, op: str, compute: Callable[..., ops.Results]) -> ops.Results:
        kept = next(self._next, ())
        # autograd writes on what an op gives
        return compute(unread=True, kept=tuple(tensor.detach() for tensor in kept))


def contexts() -> tuple[Any, Any]:
    """The contexts of a checkpoint (forward, computed again) of a layer that `unread_layers` gave."""
    if compiling():
        return policy_contexts(CheckpointPolicy.PREFER_RECOMPUTE)
    kept = _Kept()
    return kept, _Unread(kept.kept)


def compiling() -> bool:
    """Whether torch.compile traces: it asks for the contexts while it does, and takes policies alone."""
    return torch._guards.TracingContext.try_get() is not None


def policy_contexts(ours: CheckpointPolicy, others: Collection[Any] = ()) -> tuple[Any, Any]:
    """Contexts for torch.compile, in which `ours` becomes of our op and the `others`, and everything else is
    computed again.
    """
    of = {torch.ops.fastexperts.moe_mlp.default, *others}

    def policy(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return ours if op in of else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def skip(layers: list[Any]) -> None:
    """Let checkpointing, which is on for `layers`, compute them again without w2 and combine."""
    for layer in layers:
        again = functools.partial(layer._gradient_checkpointing_func, context_fn=contexts)
        layer._gradient_checkpointing_func = again


def unread_layers(model: Any, layers: list[nn.Module]) -> list[nn.Module]:
    """Those of the decoder `layers` of `model` that keep nothing of their experts' output for the backward.

    None where the model cannot be run here: on the meta device, sharded, quantised, of other inputs. Every
    parameter counts as trained, so an adapter that comes later changes nothing.
    """
    if not has_data(model):
        return []
    given: set[int] = set()
    kept: set[int] = set()
    running: list[int] = []

    def enter(layer: nn.Module, _: Any) -> None:
        running.append(id(layer))

    def leave(layer: nn.Module, _: Any, output: Any) -> Any:
        running.pop()
        if any(map(_has_nan, tree_leaves(output))):
            given.add(id(layer))
        return tree_map(_without_nan, output)  # what the next layer gets is no matter of this one

    def pack(tensor: Tensor) -> None:
        # Nothing is packed: no backward comes, and an output that its own node kept would never be freed.
        if running and _has_nan(tensor):
            kept.add(running[-1])

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    like = next(model.parameters())
    ids = torch.arange(1, TOKENS + 1, device=like.device)[None]
    try:
        with (
            _all_trained(model),
            _Unread(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed),
        ):
            model(input_ids=ids, use_cache=False)
    except Exception:  # noqa: BLE001 - other inputs than ids: nothing is known of its layers
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [layer for layer in layers if id(layer) in given - kept]


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())


def _without_nan(value: Any) -> Any:
    return value.nan_to_num() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without checkpointing, dropout and noise, every parameter asks for a gradient."""
    training = [module for module in model.modules() if module.training]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    device = next(model.parameters()).device.type
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in training:
            module.training = True
