"""One training step of a cut, set up as a case says: its time, memory, model FLOPs, and where its time is."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from breakdown import Parts, step_parts
from cuts import Cut, meta_model
from problems import dense_products
from results import OPTIMIZED, Case
from timing import take_turns
from torch import Tensor, nn
from torch.profiler import record_function

import fastexperts
from fastexperts.metrics.expert_load import ExpertLoad
from fastexperts.metrics.flops import Convention, count_flops
from fastexperts.metrics.mfu import peak_flops
from fastexperts.metrics.router_logits import RouterLogits
from fastexperts.metrics.tokens import TrainedTokens

GIB = 1 << 30
RANK = 16
WARMUP = 8


class UnavailableError(RuntimeError):
    """A case that this checkout cannot run."""


def set_checkpointing(model: nn.Module, checkpoint: str) -> None:
    if checkpoint == "full":
        # transformers 5.23 renamed it.
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    elif checkpoint != "off":
        raise UnavailableError(f"checkpoint {checkpoint!r} is fastexperts.optimize's")


def use_default(model: nn.Module, case: Case, tokens: int) -> str:
    """Transformers' own experts; `Cut.build` has selected them."""
    set_checkpointing(model, case.checkpoint)
    return ""


def use_experts(model: nn.Module, case: Case, tokens: int) -> str:
    """Our experts, and nothing else."""
    fastexperts.enable(model, verbose=False)
    set_checkpointing(model, case.checkpoint)
    return ""


def use_optimize(model: nn.Module, case: Case, tokens: int, **options: Any) -> str:
    """All parts; its summary."""
    optimize = getattr(fastexperts, "optimize", None)
    if optimize is None:
        raise UnavailableError("this checkout has no fastexperts.optimize")
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=case.weights == "fp32"):  # as it will train
        return str(optimize(model, checkpoint=case.checkpoint, tokens=tokens, verbose=False, **options))


BACKENDS = {"grouped_mm": use_default, "fastexperts": use_experts, OPTIMIZED: use_optimize}
"""name -> (model, case, tokens of a step) -> what there is to say."""


class Training:
    """A model as `case` trains it, and its step on random tokens."""

    def __init__(self, cut: Cut, case: Case, device: str) -> None:
        self.autocast = case.weights == "fp32"
        self.model = cut.build(device, case.weights)
        if case.mode == "lora":
            self.model = with_lora(self.model)
        self.flops = count_flops(self.model).per_token(cut.length)
        self.note = BACKENDS[case.backend](self.model, case, cut.tokens)
        self.ids = cut.batch_ids(device)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True) if case.optimizer else None

    def forward(self) -> Tensor:
        """The loss, by the model's `labels`."""
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> Tensor:
        self.forget()
        loss = self.forward()
        loss.backward()
        if self.optimizer:
            with record_function("part: optimizer"):
                self.optimizer.step()
        return loss.detach()

    def forget(self) -> None:
        """No gradients."""
        for parameter in self.trained:
            parameter.grad = None

    def mfu(self, tokens: int, step_ms: float, peak: float | None, convention: Convention) -> float | None:
        """Of `tokens` a step, on a card of `peak` FLOP/s."""
        if peak is None:
            return None
        return tokens * self.flops.by(convention).total / (step_ms / 1e3) / peak


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA on attention and experts by explicit targets, the same for each backend."""
    from peft import get_peft_model

    config = fastexperts.lora_config(model, r=RANK, verbose=False)
    with next(model.parameters()).device:  # the factors are drawn there
        return get_peft_model(model, config)


def values_of(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measures; where it does not fit the card, or breaks, why. Its memory is free after."""
    try:
        values = measure()
    except (torch.OutOfMemoryError, UnavailableError) as error:
        values = {"skipped": str(error).split(". ", maxsplit=1)[0]}
    except Exception as error:  # noqa: BLE001 - a card is lent for minutes: the other rows have to be run
        traceback.print_exc()
        values = {"skipped": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    free()
    return values


def measure(cut: Cut, case: Case, device: str, steps: int, peak: float | None) -> dict[str, Any]:
    """The numbers of `case`'s row."""
    training = Training(cut, case, device)
    with ExpertLoad(training.model) as load:
        loss = float(training.step())
    for _ in range(WARMUP - 1):
        training.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, state = step_times(training.step, steps, device)
    memory = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    load_LE = load.counts().double()
    median = statistics.median(times)
    return {
        "step_ms": median,
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "tokens_per_s": 1e3 * cut.tokens / median,
        "mfu_causal": training.mfu(cut.tokens, median, peak, "causal"),
        "mfu_full": training.mfu(cut.tokens, median, peak, "full"),
        "peak_gib": memory,
        "kept_gib": kept_gib(training) if device == "cuda" else None,
        "loss": loss,
        "imbalance": float((load_LE.amax(1) / load_LE.mean(1)).max()),
        "note": training.note,
        "state": state,
        "health": health_share(training.model, training.step, device) if case.watched else None,
        "parts": _parts(training),
    }


def health_share(model: nn.Module, step: Callable[[], object], device: str, count: int = 6) -> float:
    """What RoutingHealth's counting adds to a step, as a share of it: medians of steps in blocks that take
    turns.
    """
    tokens = TrainedTokens(model)
    load = ExpertLoad(model, tokens)
    counters = tokens, load, RouterLogits(model, load.layers, tokens)
    times: dict[bool, list[float]] = {False: [], True: []}
    for counting in (True, False) * 3:
        for counter in counters if counting else ():
            counter.start()
        step()  # the first tells what the routers do, and is not timed
        times[counting] += step_times(step, count, device)[0]
        for counter in counters if counting else ():
            counter.stop()
    return statistics.median(times[True]) / statistics.median(times[False]) - 1


def _parts(training: Training) -> Parts | None:
    """None, with the reason printed, where the profiler fails: what was timed stays."""
    try:
        return step_parts(training.step, training.model)
    except Exception:  # noqa: BLE001 - see measure
        traceback.print_exc()
        return None


def kept_gib(training: Training) -> float:
    """Allocated after a forward minus before, gradients aside."""
    training.forget()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = training.forward()
    kept = torch.cuda.memory_allocated() - before
    del loss
    return kept / GIB


def step_times(step: Callable[[], object], count: int, device: str) -> tuple[list[float], str | None]:
    """(ms of each of `count` steps that follow each other, the card's state in the last).

    On a card from event to event: the host runs ahead of it, as in training.
    """
    if device != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(count):
            step()
            stamps.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(stamps)], None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    state = card_state()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)], state


def card_state() -> str | None:
    """Clock, temperature and power; None where NVIDIA's library is not there to ask."""
    try:
        clock, heat, milliwatts = torch.cuda.clock_rate(), torch.cuda.temperature(), torch.cuda.power_draw()
    except Exception as error:  # noqa: BLE001 - NVML's errors are of no common kind, and nothing rests on it
        print(f"the card's state is not known: {error}", flush=True)
        return None
    return f"{clock} MHz, {heat} °C, {milliwatts / 1e3:.0f} W"


def dense_ms(cut: Cut, device: str) -> dict[str, float]:
    """ms of each plain product of one layer's experts, the limit: see layer.py."""
    products = dense_products(cut.shape, cut.tokens, device)
    if device == "cuda":
        return {name: times.ms for name, times in take_turns(products).items()}
    return {name: min(step_times(product, 3, device)[0]) for name, product in products.items()}


def describe(cut: Cut, peak: float | None) -> dict[str, Any]:
    """What all rows of a cut have in common. peak: FLOP/s of the card."""
    model = meta_model(cut)
    flops = count_flops(model)
    moe_layers = sum("is_concatenated" in vars(module) for module in model.modules())
    return {
        "cut": cut.name,
        "model_type": cut.model_type,
        "layers": cut.layers,
        "full_layers": cut.full_layers,
        "moe_layers": moe_layers,
        "experts": cut.shape.experts,
        "experts_forward_flops": moe_layers * cut.shape.forward_flops(cut.tokens),
        "batch": cut.batch,
        "length": cut.length,
        "parameters": flops.parameters,
        "active_parameters": flops.active_parameters,
        "peak_tflops": peak and peak / 1e12,
    }


def card_peak(device: str) -> float | None:
    """FLOP/s in dense bf16; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
