"""What the benchmarks write and the report reads: rows of the layer's table, its breakdown, where it ran."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shapes import SHAPES

Record = dict[str, Any]
OURS, DEFAULT, OPTIMIZED = "fastexperts", "grouped_mm", "fastexperts + optimize"


@dataclass(frozen=True)
class Row:
    """One implementation on one problem: times in ms (medians), memory in MiB; `host_ms` is what the host
    needs to enqueue a step. `errors` are relative, against `errors_against`. A `skipped` row says why.
    """

    shape: str
    tokens: int
    routing: str
    implementation: str
    forward_ms: float | None = None
    step_ms: float | None = None
    host_ms: float | None = None
    kept_mib: float | None = None
    peak_mib: float | None = None
    errors: dict[str, float] | None = None
    errors_against: str | None = None
    skipped: str | None = None

    @property
    def where(self) -> tuple[str, int, str]:
        return self.shape, self.tokens, self.routing

    @property
    def tflops(self) -> tuple[float, float]:
        """(forward, forward + backward): 6*T*K*D*F and 18*T*K*D*F over the times."""
        flops = SHAPES[self.shape].forward_flops(self.tokens)
        assert self.forward_ms is not None
        assert self.step_ms is not None
        return flops / self.forward_ms / 1e9, 3 * flops / self.step_ms / 1e9

    @property
    def largest_error(self) -> float | None:
        return max(self.errors.values()) if self.errors else None

    @property
    def waits_for_host(self) -> bool:
        """Launching takes as long as running: the card idles."""
        return self.host_ms is not None and self.step_ms is not None and self.host_ms > 0.9 * self.step_ms


@dataclass(frozen=True)
class LoraRow(Row):
    """A row of lora.py. `baddbmm`: folds of a weight in one step."""

    rank: int = 0
    baddbmm: int | None = None

    @property
    def tflops(self) -> tuple[float, float]:
        """(forward, forward + backward) of the frozen layer, 6*T*K*D*F and 12*T*K*D*F, over the times."""
        forward, step = super().tflops
        return forward, step * 2 / 3


@dataclass(frozen=True)
class Case:
    """How a model trains. mode: full or lora; weights: bf16, or fp32 under bf16 autocast; backend: one of
    step.BACKENDS; checkpoint: full, off, or what `fastexperts.optimize` takes; optimizer: AdamW in the step.
    """

    mode: str = "full"
    weights: str = "bf16"
    backend: str = DEFAULT
    checkpoint: str = "full"
    optimizer: bool = False

    @property
    def watched(self) -> bool:
        """Whether the cost of RoutingHealth is measured."""
        return self.backend == OPTIMIZED and self.checkpoint == "full" and not self.optimizer

    @property
    def setting(self) -> tuple[str, str, bool]:
        """What a case and the default that it is compared with have in common."""
        return self.mode, self.weights, self.optimizer


@dataclass(frozen=True)
class StepRow(Case):
    """A whole training step. Times in ms, memory in GiB; kept: after forward, beside the weights.

    MFU by both conventions of metrics/flops.py, 0 to 1. parts: part -> phase -> ms of a profiled step
    (breakdown.py); imbalance: the busiest expert's load over the mean, of the worst layer; health: what
    RoutingHealth's counting adds to a step, as a share of it; state: of the card while it ran. A `skipped`
    row says why.
    """

    cut: str = ""
    step_ms: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    tokens_per_s: float | None = None
    mfu_causal: float | None = None
    mfu_full: float | None = None
    peak_gib: float | None = None
    kept_gib: float | None = None
    loss: float | None = None
    imbalance: float | None = None
    note: str = ""
    state: str | None = None
    health: float | None = None
    parts: dict[str, dict[str, float]] | None = None
    skipped: str | None = None

    @property
    def parts_ms(self) -> float:
        return sum(ms for phases in (self.parts or {}).values() for ms in phases.values())

    @property
    def is_usual(self) -> bool:
        """Whether the profiled step's kernels take about as long as a step, if on a card. On one that is
        nearly full the profiler saw seconds in the place of the 0.4 that the steps took.
        """
        return self.state is None or (self.step_ms is not None and self.parts_ms < 1.5 * self.step_ms)

    @property
    def experts_ms(self) -> float:
        """What the experts take of forward and backward, recomputation left out."""
        phases = (self.parts or {}).get("experts", {})
        return phases.get("forward", 0.0) + phases.get("backward", 0.0)

    def of_dense(self, dense: dict[str, float], layers: int) -> float | None:
        """The dense products' time over that of the experts of `layers`.

        dense: product -> ms in one layer. Frozen experts have no dw.
        """
        products = [ms for name, ms in dense.items() if self.mode == "full" or not name.startswith("dw")]
        return layers * sum(products) / self.experts_ms if self.experts_ms else None

    def experts_tflops(self, forward_flops: int) -> float | None:
        """By the FLOPs of the experts' products: twice the forward's in a backward, as much if frozen."""
        flops = forward_flops * (3 if self.mode == "full" else 2)
        return flops / self.experts_ms / 1e9 if self.experts_ms else None


def default_of(row: StepRow, rows: Iterable[StepRow]) -> StepRow | None:
    """What `row` is compared with: the default that recomputes as much, else the one that recomputes all."""
    found = [r for r in rows if r.backend == DEFAULT and r.setting == row.setting and not r.skipped]
    found.sort(key=lambda default: (default.checkpoint != row.checkpoint, default.checkpoint != "full"))
    return found[0] if found else None


@dataclass(frozen=True)
class TrainerRow:
    """In TRL's SFTTrainer: medians of what PerformanceCallback logs, and MFU by a clock of the benchmark."""

    mode: str
    backend: str
    step_ms: float | None = None
    tokens_per_s: float | None = None
    mfu_logged: float | None = None
    mfu_clocked: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    note: str = ""
    skipped: str | None = None


@dataclass(frozen=True)
class CurveRow:
    """Loss curves of several seeds. deviation: the median of |loss - fp32's|; loss, exact_loss: means of the
    last tenth, its own and fp32's.
    """

    weights: str
    backend: str
    seeds: int
    deviation: float
    loss: float
    exact_loss: float


@dataclass(frozen=True)
class FamilyRow:
    """Of one family: TF/s of its matrix products and of the plain layer's."""

    family: str
    tokens: int
    forward_tflops: float
    step_tflops: float
    plain_forward_tflops: float
    plain_step_tflops: float

    @property
    def shares(self) -> tuple[float, float]:
        """(forward, forward + backward) of the plain layer's speed."""
        return self.forward_tflops / self.plain_forward_tflops, self.step_tflops / self.plain_step_tflops


@dataclass(frozen=True)
class PassRow:
    """One step of our layer alone. `dense_ms`: the dense product of the same FLOPs, None without products."""

    name: str
    ms: float
    flops: int
    bytes: int
    dense_ms: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """Of one step. copy_ms: of `copy_bytes`, half read and half written. timer_ms: a graph of one tiny
    kernel, which is in every time here. kernels: (name, ms, launches, is a grouped GEMM) in a whole step.
    """

    shape: str
    tokens: int
    routing: str
    copy_ms: float
    copy_bytes: int
    timer_ms: float
    passes: list[PassRow]
    kernels: list[tuple[str, float, float, bool]]

    @classmethod
    def of(cls, record: Record) -> Breakdown:
        passes = [PassRow(**row) for row in record["passes"]]
        return cls(**{**record, "passes": passes, "kernels": [tuple(k) for k in record["kernels"]]})

    def floor_ms(self, row: PassRow) -> float:
        """The dense product's time or the least bytes at the copy's speed, whichever is longer."""
        return max(row.dense_ms or 0.0, row.bytes / self.copy_bytes * self.copy_ms)

    @property
    def passes_ms(self) -> float:
        return sum(row.ms for row in self.passes)

    @property
    def share_without_products(self) -> float:
        """What the passes without a matrix product take of the sum of all."""
        return sum(row.ms for row in self.passes if not row.flops) / self.passes_ms

    @property
    def kernels_ms(self) -> float:
        return sum(ms for _, ms, _, _ in self.kernels)

    @property
    def share_of_other_kernels(self) -> float | None:
        """What kernels that are no grouped GEMM take of all kernels' time."""
        others = sum(ms for _, ms, _, product in self.kernels if not product)
        return others / self.kernels_ms if self.kernels else None


def environment(card: str | None = None) -> dict[str, str]:
    """Card (or `card`, what is in its place), versions and command of this run."""
    import peers
    import torch
    import transformers
    import triton

    import fastexperts

    return {
        "card": card or torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "fastexperts": fastexperts.__version__,
        **peers.versions(),
        "commit": _commit(),
        "command": " ".join(("python", *sys.argv)),
    }


def _commit() -> str:
    """Of the checkout, "+" where the tree differs; "unknown" in a copy without its history."""
    git, quiet = ("git", "-C", str(Path(__file__).parent)), subprocess.DEVNULL
    try:
        head = subprocess.check_output((*git, "rev-parse", "--short", "HEAD"), text=True, stderr=quiet)
        changed = subprocess.check_output((*git, "diff", "HEAD", "--stat", "--", ".."), stderr=quiet)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed else "")


def write_layer(
    output: str, rows: Iterable[Row], breakdown: Breakdown | None, environment: dict[str, str]
) -> None:
    """`output`.json."""
    steps = asdict(breakdown) if breakdown else None
    write(output, {"environment": environment, "rows": [asdict(row) for row in rows], "breakdown": steps})


def write_lora(output: str, rows: Iterable[LoraRow], environment: dict[str, str]) -> None:
    """`output`.json of lora.py."""
    write(output, {"environment": environment, "lora": {"rows": [asdict(row) for row in rows]}})


def write(output: str, record: Record) -> None:
    """`output`.json, whole or not at all: a run can be cut at any moment."""
    path = Path(f"{output}.json")  # dots in the name stay
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def rows_of(record: Record) -> list[Row]:
    """Fields that this version does not know (ones that follow from others) are left."""
    known = {field.name for field in fields(Row)}
    return [Row(**{name: value for name, value in row.items() if name in known}) for row in record["rows"]]


def lora_rows_of(record: Record) -> list[LoraRow]:
    return [LoraRow(**row) for row in record["lora"]["rows"]]


def breakdown_of(record: Record) -> Breakdown | None:
    """None as well for a list, the form before 0.2, which has no floors."""
    steps = record["breakdown"]
    return Breakdown.of(steps) if isinstance(steps, dict) else None


def dense_of(rows: Iterable[Row]) -> dict[tuple[str, int, str], Row]:
    """Where -> the dense row there."""
    return {row.where: row for row in rows if row.implementation == "dense"}


def shares(row: Row, dense: Row | None) -> tuple[float, float] | None:
    """The limit's times over the row's: (forward, forward + backward)."""
    if dense is None or row.skipped or dense.skipped:
        return None
    assert row.forward_ms and row.step_ms and dense.forward_ms and dense.step_ms  # noqa: PT018 - one condition
    return dense.forward_ms / row.forward_ms, dense.step_ms / row.step_ms
