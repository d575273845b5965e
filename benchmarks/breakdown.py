"""Where a training step's time is: the profiler's events, each given to one part of the model and one phase.

Ranges (`record_function`) stand around the forward of each module that is a part. What runs in a range
belongs to the innermost one. What autograd runs backward belongs to the range of the operation that it is
the gradient of, which autograd's sequence numbers tell. A range within the backward is gradient
checkpointing's recomputation. On a card an event's time is that of the kernels it launched; on a CPU its own
time, without what it calls. Each event goes to one place, so that the places sum up to the whole.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastexperts.hf.inventory import unwrapped

FORWARD, RECOMPUTE, BACKWARD = PHASES = ("forward", "recompute", "backward")
REST, UNKNOWN = "rest", "not attributed"
PARTS = (
    "attention",
    "projections",
    "rotary",
    "norms",
    "router",
    "experts",
    "dense MLPs",
    "loss and LM head",
    "optimizer",
    REST,
    UNKNOWN,
)
"""attention: scores, softmax and values; projections: its linear maps. router: also what surrounds the
experts in a MoE block. dense MLPs: and shared experts. rest: residuals, embedding, accumulation of gradients.
not attributed: kernels that the profiler links to no operation.
"""

_PREFIX = "part: "
_NODE = "autograd::engine::evaluate_function: "
_USER_SCOPE = 7  # at::RecordScope
_ROTARY = "apply_rotary_pos_emb"
_CHECKPOINT = "_gradient_checkpointing_func"  # of a layer, set by transformers
# An autograd function, where the rotation is called by no name; and not its gradient.
_ROTATION = re.compile(r"\w*(Rope|Rotary)\w*(?<!Backward)")
_RUNTIME = re.compile(r"cu(da)?[A-Z]")  # cudaLaunchKernel, cuLaunchKernelEx: no operations

Parts = dict[str, dict[str, float]]


class Span(NamedTuple):
    """An event on the host, in the order of their starts. own_us: its time, or that of its kernels.

    parent: index of the event around it, or None. sequence, forward_thread: as autograd numbers operations;
    a gradient has the sequence of its operation and the thread that it ran in.
    """

    name: str
    thread: int
    parent: int | None
    own_us: float
    sequence: int = -1
    forward_thread: int = 0


def step_parts(step: Callable[[], object], model: nn.Module) -> Parts:
    """part -> phase -> ms of one call of `step`, which trains `model`; the phases in which time was spent."""
    on_card = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with part_ranges(model), profile(activities=activities) as profiler:
        step()
        if on_card:
            torch.cuda.synchronize()
    spans, unlinked_us = spans_of(profiler.events(), on_card)
    parts = attribute(spans)
    return parts | {UNKNOWN: {FORWARD: unlinked_us / 1e3}} if unlinked_us else parts


def attribute(spans: Iterable[Span]) -> Parts:
    """part -> phase -> ms; every span's own time lands in exactly one."""
    spans = list(spans)
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span, (part, phase) in zip(spans, places(spans), strict=True):
        if span.own_us:
            found[part][phase] += span.own_us / 1e3
    return {part: dict(found[part]) for part in PARTS if part in found}


def places(spans: list[Span]) -> list[tuple[str, str]]:
    """(part, phase) of each."""
    operations = _operations(spans)
    return [_place(span, spans, operations) for span in spans]


def _operations(spans: list[Span]) -> dict[tuple[int, int], Span]:
    """(thread, sequence) -> the forward operation. Of several, the last to begin made the gradient's node:
    the number rises with that.
    """
    found = {}
    for span in spans:
        if span.sequence >= 0 and not span.forward_thread and not span.name.startswith(_NODE):
            found[span.thread, span.sequence] = span
    return found


def _place(span: Span, spans: list[Span], operations: dict[tuple[int, int], Span]) -> tuple[str, str]:
    part, node = _surroundings(span, spans)
    if part is not None:
        return part, FORWARD if node is None else RECOMPUTE
    if node is None:
        return REST, FORWARD
    operation = operations.get((node.forward_thread, node.sequence))
    part = None if operation is None else _surroundings(operation, spans)[0]
    return part or REST, BACKWARD


def _surroundings(span: Span, spans: list[Span]) -> tuple[str | None, Span | None]:
    """(the innermost range around it, the gradient's node around that): a range outside of the node is not
    one of its operations.
    """
    part = None
    at: Span | None = span
    while at is not None:
        if at.name.startswith(_NODE):
            return part, at
        if part is None and at.name.startswith(_PREFIX):
            part = at.name.removeprefix(_PREFIX)
        elif part is None and _ROTATION.fullmatch(at.name):
            part = "rotary"
        at = None if at.parent is None else spans[at.parent]
    return part, None


def spans_of(events: Iterable[Any], on_card: bool) -> tuple[list[Span], float]:
    """The profiler's events on the host, and the us of kernels that no event launched, as far as is known."""
    events = list(events)
    # Ids of calls of CUDA and of operations are counted apart: a call may seem to have launched another's.
    host = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CPU
        and not event.is_async
        and not _RUNTIME.match(event.name)
    ]
    # The profiler mirrors ranges on the card, as if they were kernels.
    mirrored = {event.name for event in host if event.scope == _USER_SCOPE}
    index = {id(event): i for i, event in enumerate(host)}

    def own_us(event: Any) -> float:
        if not on_card:
            return event.self_cpu_time_total
        return sum(kernel.duration for kernel in event.kernels if kernel.name not in mirrored)

    spans = [
        Span(
            event.name,
            event.thread,
            index.get(id(event.cpu_parent)),
            own_us(event),
            event.sequence_nr,
            event.fwd_thread or 0,
        )
        for event in host
    ]
    kernels_us = sum(
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in mirrored
    )
    unlinked_us = kernels_us - sum(span.own_us for span in spans) if on_card else 0.0
    return spans, unlinked_us if unlinked_us > 1e-6 * kernels_us else 0.0


@contextlib.contextmanager
def part_ranges(model: nn.Module) -> Iterator[None]:
    """Ranges around the forward of each part of `model`; within, and gone after."""
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name, part in parts_of(modules).items():
            names, forward = vars(modules[name]), modules[name].forward
            stack.enter_context(_replaced(names, "forward", _in_range(forward, part)))
            if part == "attention":
                for scope, key in _rotary_functions(forward):
                    if not hasattr(scope[key], "in_range"):  # layers share the names of their file
                        stack.enter_context(_replaced(scope, key, _in_range(scope[key], "rotary")))
            if _CHECKPOINT in names:
                again = functools.partial(_checkpoint_in_range, names[_CHECKPOINT], part)
                stack.enter_context(_replaced(names, _CHECKPOINT, again))
        yield


def _checkpoint_in_range(
    checkpoint: Callable[..., Any], part: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The range goes into what is called again: since transformers 5.23 that is not the layer's forward."""
    return checkpoint(_in_range(function, part), *args, **kwargs)


def parts_of(modules: dict[str, nn.Module]) -> dict[str, str]:
    """name -> part, of the modules that are one. A module within another of the same part is none; a layer
    always is: its range tells the recomputation of what is in no other part.
    """
    experts = {unwrapped(name) for name, module in modules.items() if "is_concatenated" in vars(module)}
    blocks = {name.rpartition(".")[0] for name in experts}
    found: dict[str, str] = {}
    for name, module in modules.items():
        part = _part_of(name, module, experts, blocks, found)
        if part == REST or part not in (None, _around(name, found)):
            found[name] = part
    return found


def _part_of(
    name: str, module: nn.Module, experts: set[str], blocks: set[str], found: dict[str, str]
) -> str | None:
    kind, last = type(module).__name__, name.rpartition(".")[2]
    around = _around(name, found)
    rows = (
        (around == "experts", None),  # what they call is theirs
        (name in experts, "experts"),
        (name in blocks, "router"),
        ("norm" in kind.lower(), "norms"),
        ("rotary" in kind.lower(), "rotary"),
        (kind.endswith("Attention"), "attention"),
        (around == "attention" and _is_linear(module), "projections"),
        (last in ("mlp", "feed_forward") or last.startswith("shared_expert"), "dense MLPs"),
        (kind.endswith("DecoderLayer") or isinstance(getattr(module, "layers", None), nn.ModuleList), REST),
        (kind.endswith("ForCausalLM"), "loss and LM head"),
    )
    return next((part for true, part in rows if true), None)


def _is_linear(module: nn.Module) -> bool:
    """And not what is inside of an adapted one."""
    return isinstance(getattr(module, "weight", None), torch.Tensor) and hasattr(module, "in_features")


def _around(name: str, found: dict[str, str]) -> str | None:
    """The part of the nearest module around `name`."""
    while name:
        name = name.rpartition(".")[0]
        if name in found:
            return found[name]
    return None


def _rotary_functions(forward: Callable[..., Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the forward of an attention finds the functions that rotate queries and keys: (names, name)."""
    function = inspect.unwrap(forward)
    names = getattr(getattr(function, "__func__", function), "__globals__", {})
    yield from ((names, key) for key in list(names) if key.startswith(_ROTARY))


def _in_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + part):
            return function(*args, **kwargs)

    within.in_range = part
    return within


@contextlib.contextmanager
def _replaced(names: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """`names[key]` is `value`, and after that what it was, or not there."""
    there, before = key in names, names.get(key)
    names[key] = value
    try:
        yield
    finally:
        if there:
            names[key] = before
        else:
            del names[key]
