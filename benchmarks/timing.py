"""Clocks: medians of calls that take turns, CUDA graphs of single steps, and the kernels of a whole step."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
ROUNDS = 5


@dataclass(frozen=True)
class Times:
    """Medians in ms: between two events around a call, and of the host that enqueues it."""

    ms: float
    host_ms: float


def plan(estimate_ms: float, warmup_ms: float, measure_ms: float) -> tuple[int, int]:
    """(warmup calls, calls in each of ROUNDS rounds): at least 1 each, and 200 calls are enough."""
    estimate_ms = max(estimate_ms, 1e-3)
    calls = min(200, math.ceil(measure_ms / estimate_ms))
    return max(1, min(100, round(warmup_ms / estimate_ms))), max(1, math.ceil(calls / ROUNDS))


def turns(names: Iterable[Any]) -> list[list[Any]]:
    """ROUNDS orders of all `names`, the same in every run. Shuffled: at its limit of power a card may run
    one faster behind another that needed less, so none always follows the same.
    """
    names, order = list(names), random.Random(0)
    return [order.sample(names, len(names)) for _ in range(ROUNDS)]


def take_turns(
    calls: Mapping[Any, Call], warmup_ms: float = 60.0, measure_ms: float = 150.0
) -> dict[Any, Times]:
    """Times of each call. In every round each has its turn, as `turns` says: all share the clocks and the
    heat of the card. L2 is flushed before every call, outside of its time.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def run(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        host = time.perf_counter()
        call()
        host = time.perf_counter() - host
        end.record()
        return start, end, 1e3 * host

    def estimate(call: Call) -> float:
        run(call)  # compiles, and fills the allocator
        start, end, _ = run(call)
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    plans = {name: plan(estimate(call), warmup_ms, measure_ms) for name, call in calls.items()}
    for name, call in calls.items():
        for _ in range(plans[name][0]):
            run(call)
    runs = {name: [] for name in calls}
    for order in turns(calls):
        for name in order:
            runs[name] += [run(calls[name]) for _ in range(plans[name][1])]
        torch.cuda.synchronize()
    return {
        name: Times(
            statistics.median(start.elapsed_time(end) for start, end, _ in done),
            statistics.median(host for _, _, host in done),
        )
        for name, done in runs.items()
    }


def graphed(call: Call) -> Call:
    """`call` as the replay of a CUDA graph: what the host needs to launch it is not in its time."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernels(call: Call, steps: int = 5) -> dict[str, tuple[float, float]]:
    """name -> (ms, launches) a step, of everything that ran on the card, as CUPTI saw it; caches as they
    come.
    """
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    on_card = torch.autograd.DeviceType.CUDA
    seen = {
        event.key: (event.self_device_time_total / 1e3 / steps, event.count / steps)
        for event in profile.key_averages()
        if event.device_type == on_card and event.self_device_time_total > 0
    }
    return dict(sorted(seen.items(), key=lambda item: -item[1][0]))
