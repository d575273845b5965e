"""How well a training run uses its GPUs: model FLOPs utilisation in any transformers Trainer's logs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.metrics.flops import Convention, ModelFlops, Work, count_flops
from fastexperts.metrics.tokens import TokenMeter

PEAK_FLOPS = (
    # Dense bf16 with fp32 accumulation, from NVIDIA's data sheets and, for consumer cards, its architecture
    # whitepapers; where they print the number with sparsity, half of it. The first row in a name is taken.
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835.5e12),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362.05e12),
    ("L40", 181.05e12),
    ("L4", 121e12 / 2),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),  # AMD's data sheet
)
"""Part of a card's name -> its peak, FLOP/s."""

_OTHERS = re.compile(r"MIG|GRID|\d+[ABCQ]|Laptop|Mobile|D|Ti")
"""Words in the name of a part of a card (a vGPU: A100-10C), or of a card that is not its namesake."""
_LAYER = "GradientCheckpointingLayer"


class PerformanceCallback(TrainerCallback):
    """Logs `perf/mfu`, `perf/hfu`, `perf/tokens_per_s` and `perf/peak_memory` with each training loss.

        trainer = SFTTrainer(model, ...)
        PerformanceCallback().attach(trainer)

    perf/mfu: model FLOPs (flops.py) per second and GPU, over the peak; 0 to 1. Attention is counted by
        document, and by `convention`.
    perf/hfu: the same with what gradient checkpointing computes once more.
    perf/tokens_per_s: of all processes together, padding excluded.
    perf/peak_memory: what PyTorch allocated at most since training began, GiB, of the process with most.

    Each is about the time since the last log without evaluation and saving; waiting for data counts, and
    so do compilation and other work of a first step. On a device whose peak is not known, as on a CPU,
    and where the FLOPs cannot be told, MFU and HFU are left out and the reason is said, once.
    """

    def __init__(
        self,
        *,
        convention: Convention = "causal",
        peak_flops: float | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        """Measure by `convention`, against `peak_flops` (FLOP/s of one GPU) instead of the table's.

        `say` gets a line with what is measured, on the first process.
        """
        if convention not in ("causal", "full"):
            raise refuse(
                "PerformanceCallback",
                "convention",
                got=repr(convention),
                needs="'causal' or 'full'",
                way_out="See docs/metrics.md.",
            )
        if peak_flops is not None and not peak_flops > 0:
            raise refuse(
                "PerformanceCallback",
                "peak_flops",
                got=peak_flops,
                needs="FLOP/s of one GPU, above 0",
                way_out="Leave it out for the data sheet's.",
            )
        self._convention: Convention = convention
        self._given_peak, self._say = peak_flops, say
        self._meter: TokenMeter | None = None
        self._flops: ModelFlops | None = None
        self._peak = self._recomputed = 0.0
        self._kept: frozenset[str] = frozenset()
        self._copies = 1
        self._start = self._mark = 0.0
        self.not_logged: str | None = None
        """Why MFU is not logged, once training has begun; None where it is."""

    def attach(self, trainer: Any) -> PerformanceCallback:
        """Add it to `trainer` before its other callbacks, so that trackers such as TensorBoard log it too.

        With `callbacks=[PerformanceCallback()]` the values reach `log_history` and what is printed only:
        trackers come first there.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Count the model, find the peak, and watch the batches."""
        self._stop()
        if args.n_gpu > 1:
            self.not_logged = "DataParallel runs copies of the model. Start a process for each GPU."
            self._say_first(args, f"Performance is not logged: {self.not_logged}")
            return
        self._copies = _tensor_parallel(args, model)
        self._flops = self._count(args, model)
        spans = () if self._flops is None else tuple(self._flops.pairs)
        self._meter = TokenMeter(model, spans, causal=self._convention == "causal")
        self._recomputed, self._kept = recomputed_share(model), kept(model)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._start = self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note where a step ends: evaluation and saving come after it."""
        self._mark = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the evaluation's time out."""
        self._skip()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the time of saving out."""
        self._skip()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the values to a training step's logs."""
        if self._meter is None or logs is None or "loss" not in logs:
            return
        values = self._measure(args)
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watch no more."""
        self._stop()

    def _count(self, args: Any, model: Any) -> ModelFlops | None:
        name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
        peak = self._given_peak or peak_flops(name)
        if peak is None:
            way_out = "Give PerformanceCallback(peak_flops=...)."
            self._leave_out(args, f"the peak of {name} is not known. {way_out}")
            return None
        if self._copies > 1 or _splits_sequences(args):
            self._leave_out(args, "a batch that several processes compute together is not counted.")
            return None
        try:
            flops = count_flops(model)
        except FastexpertsError as error:
            self._leave_out(args, str(error))
            return None
        self._peak = peak
        self._say_first(
            args,
            f"MFU: {flops}; {self._convention} attention; "
            f"peak {peak / 1e12:,.1f} TFLOP/s on each of {args.world_size} x {name}.",
        )
        return flops

    def _measure(self, args: Any) -> dict[str, float]:
        assert self._meter is not None
        tokens, keys = self._meter.take()  # waits for the device, so that the clock is read after its work
        seconds, memory = time.perf_counter() - self._start, 0.0
        if args.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(args.device) / 2**30
        self._start = self._mark = time.perf_counter()
        work, again = Work(), 0.0
        if self._flops is not None:
            parts = {name: part * tokens for name, part in self._flops.fixed.items()}
            scores = sum((each * keys[span] for span, each in self._flops.pairs.items()), Work())
            work = sum(parts.values(), scores)
            spared = {"moe_mlp": parts["experts"].repeated, "attention": scores.repeated}
            again = work.repeated - sum(spared[name] for name in self._kept)
        hardware = work.total + again * self._recomputed
        tokens_all, model_all, hardware_all = _reduce(args, [tokens, work.total, hardware], "SUM")
        seconds, memory = _reduce(args, [seconds, memory], "MAX")
        if tokens_all == 0:
            self._say_first(args, "Performance is not logged: no batch of the model had tokens to count.")
            self._stop()
            return {}
        values = {"perf/tokens_per_s": tokens_all / self._copies / seconds}
        if self._flops is not None:
            capacity = self._peak * args.world_size * seconds
            values |= {"perf/mfu": model_all / capacity, "perf/hfu": hardware_all / capacity}
        if args.device.type == "cuda":
            values["perf/peak_memory"] = memory
        return values

    def _leave_out(self, args: Any, reason: str) -> None:
        self.not_logged = reason
        self._say_first(args, f"MFU is not logged: {reason}")

    def _say_first(self, args: Any, line: str) -> None:
        if args.process_index == 0:
            self._say(line)

    def _skip(self) -> None:
        now = time.perf_counter()
        self._start, self._mark = self._start + now - self._mark, now

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.stop()
        self._meter = self._flops = None


def peak_flops(device_name: str) -> float | None:
    """The peak of a card in dense bf16, FLOP/s, or None where it is not known."""
    words = device_name.replace("-", " ").split()
    if any(map(_OTHERS.fullmatch, words)):
        return None
    return next((peak for name, peak in PEAK_FLOPS if _has(words, name.split())), None)


def _has(words: list[str], wanted: list[str]) -> bool:
    # Whole words: "H20" is not in "NVIDIA H200".
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def recomputed_share(model: nn.Module) -> float:
    """The share of `model`'s layers that gradient checkpointing computes once more in the backward."""
    layers = [m for m in model.modules() if any(c.__name__ == _LAYER for c in type(m).__mro__)]
    wrapped = {id(m) for name, m in model.named_modules() if name.endswith("_checkpoint_wrapped_module")}
    again = [layer for layer in layers if _checkpoints(layer) or id(layer) in wrapped]
    return len(again) / len(layers) if layers else 0.0


def kept(model: nn.Module) -> frozenset[str]:
    """What of a recomputed layer's forward is not computed again, "moe_mlp" and "attention" (its scores):
    what `keep` of hf/recompute.py, checkpointing's context, was asked for. Attention with a mask runs again
    all the same, uncounted.
    """
    switched = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    contexts = (getattr(function, "keywords", {}).get("context_fn") for function in switched)
    asked = (getattr(context, "keywords", {}).get("of") for context in contexts)
    return frozenset(next(filter(None, asked), ()))


def _checkpoints(layer: Any) -> bool:
    return bool(layer.gradient_checkpointing)


def _tensor_parallel(args: Any, model: Any) -> int:
    """How many processes compute one batch together."""
    config = getattr(args, "parallelism_config", None)
    return max(getattr(config, "tp_size", 1) or 1, getattr(model, "tp_size", 1) or 1)


def _splits_sequences(args: Any) -> bool:
    config = getattr(args, "parallelism_config", None)
    return any((getattr(config, name, 1) or 1) > 1 for name in ("cp_size", "sp_size"))


def _reduce(args: Any, values: list[float], how: Literal["SUM", "MAX"]) -> list[float]:
    """`values` of all processes, reduced."""
    if args.world_size == 1:
        return values
    reduced = torch.tensor(values, dtype=torch.float64, device=args.device)
    torch.distributed.all_reduce(reduced, op=getattr(torch.distributed.ReduceOp, how))
    return list(reduced.tolist())
