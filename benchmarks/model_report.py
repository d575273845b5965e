"""The report's sections of model.py: whole steps, where their time is, TRL's trainer, loss curves."""

from __future__ import annotations

from dataclasses import replace

from breakdown import PARTS, PHASES
from results import DEFAULT, CurveRow, Record, StepRow, TrainerRow, default_of
from tables import environment_line, table

Found = dict[str, object]
NO_PARTS = "No profile, or one of a step that was not like those that were timed.\n"


RECOMPUTED = {
    "full": "all",
    "keep-experts": "all but experts",
    "keep-attention": "all but experts and attention",
    "off": "nothing",
}


def step_rows_of(found: Record) -> list[StepRow]:
    """Of a record of model.py; without the parts of a profiled step that was unlike those that were timed."""
    rows = [StepRow(**row) for row in found["rows"]]
    return [replace(row, parts=None) if row.parts and not row.is_usual else row for row in rows]


def case_of(row: StepRow) -> list[str]:
    checkpoint = RECOMPUTED.get(row.checkpoint, row.checkpoint)
    return [row.mode, row.weights, row.backend, checkpoint, "AdamW" if row.optimizer else "none"]


def step_table(found: Record) -> str:
    """Every row in full."""
    rows = step_rows_of(found)
    heads = ["mode", "weights", "experts", "recomputed", "optimizer", "step ms", "tokens/s", "MFU causal"]
    heads += ["MFU full", "faster", "peak GiB", "kept GiB", "experts of dense", "imbalance", "loss"]
    heads += ["routing health", "card"]
    lines = []
    for row in rows:
        if row.skipped:
            lines.append([*case_of(row), *["-"] * 11, f"skipped: {row.skipped}"])
            continue
        default = default_of(row, rows)
        share = _number(row.of_dense(found["dense"], found["moe_layers"]), ".2f")
        tflops = _number(row.experts_tflops(found["experts_forward_flops"]), ".0f")
        lines.append(
            [
                *case_of(row),
                f"{row.step_ms:.1f} ({row.fastest_ms:.1f}-{row.slowest_ms:.1f})",
                f"{row.tokens_per_s:,.0f}",
                _percent(row.mfu_causal),
                _percent(row.mfu_full),
                f"{default.step_ms / row.step_ms:.2f} x" if default else "-",
                _number(row.peak_gib, ".1f"),
                _number(row.kept_gib, ".2f"),
                f"{share} ({tflops} TF/s)",
                _number(row.imbalance, ".2f"),
                _number(row.loss, ".4f"),
                _number(row.health, "+.2%"),
                row.state or "-",
            ]
        )
    return table(heads, lines)


def _percent(share: float | None) -> str:
    return _number(share, ".1%")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def parts_tables(rows: list[StepRow]) -> str:
    """One for each mode and dtype of weights."""
    groups = dict.fromkeys((row.mode, row.weights) for row in rows if row.parts)
    return "\n".join(
        _parts_table([row for row in rows if row.parts and (row.mode, row.weights) == group])
        for group in groups
    )


def _parts_table(rows: list[StepRow]) -> str:
    """ms by part, forward and backward, a column a case; recomputation is a line of its own."""
    lines = []
    for part in PARTS:
        cells = [sum(_phase(row, part, phase) for phase in PHASES if phase != "recompute") for row in rows]
        if any(cells):
            lines.append([part, *(f"{ms:.2f}" for ms in cells)])
    again = [sum(_phase(row, part, "recompute") for part in PARTS) for row in rows]
    lines.append(["recomputed", *(f"{ms:.2f}" for ms in again)])
    lines.append(["**together**", *(f"**{row.parts_ms:.2f}**" for row in rows)])
    lines.append(["a step takes", *(f"{row.step_ms:.2f}" for row in rows)])
    return table(["ms", *(", ".join(_short(row)) for row in rows)], lines)


def _phase(row: StepRow, part: str, phase: str) -> float:
    return (row.parts or {}).get(part, {}).get(phase, 0.0)


def _short(row: StepRow) -> list[str]:
    """What tells it from the others; the usual is not said."""
    mode, weights, backend, checkpoint, optimizer = case_of(row)
    options = [f"{checkpoint} recomputed"] if row.checkpoint != "full" else []
    return [f"{mode} {weights}", backend, *options, *([optimizer] if row.optimizer else [])]


def phases_table(row: StepRow) -> str:
    """Of one case: a line a part, a column a phase."""
    lines = []
    for part, phases in (row.parts or {}).items():
        together = sum(phases.values())
        cells = [f"{phases.get(phase, 0.0):.2f}" for phase in PHASES]
        lines.append([part, *cells, f"{together:.2f}", f"{together / row.parts_ms:.1%}"])
    return table(["part", *PHASES, "together, ms", "share"], lines)


def describe_cut(found: Record) -> str:
    shape = f"{found['layers']} of {found['full_layers']} layers, {found['moe_layers']} of them with"
    peak = f" MFU is of {found['peak_tflops']:,.1f} TFLOP/s." if found["peak_tflops"] else ""
    caveat = f"\n{found['caveat']}" if "caveat" in found else ""  # said afterwards, not by the run
    return f"""\
{found["cut"]} ({found["model_type"]}): {shape} {found["experts"]} experts; {found["parameters"]:,}
parameters, {found["active_parameters"]:,} active; random weights; a step has
{found["batch"]} x {found["length"]:,} tokens.{peak}{caveat}
"""


def step_page(record: Record) -> str:
    """model-CUT.md: every row, and of each where its time is."""
    found = record["model"]
    parts = [f"{environment_line(record)}\n\n    {record['environment']['command']}\n\n{describe_cut(found)}"]
    parts.append(step_table(found))
    for row in step_rows_of(found):
        if not row.skipped:
            note = f"```\n{row.note}\n```\n\n" if row.note else ""
            phases = phases_table(row) if row.parts else NO_PARTS
            parts.append(f"## {', '.join(_short(row))}\n\n{note}{phases}")
    return "\n".join(parts)


def step_section(name: str, record: Record) -> str:
    """Of docs/benchmarks.md."""
    found = record["model"]
    return f"""\
{environment_line(record)}.

{describe_cut(found)}
Forward and backward, gradient checkpointing unless it says otherwise, sdpa, median of {found["steps"]} steps
(least and most). *faster*: than the default in the same mode, of the same run. *experts of dense*: the time
of the experts' matrix products in plain cuBLAS over what the experts take of forward and backward, in the
step. *imbalance*: the busiest expert's load over the mean, in the worst layer. *routing health*: what
RoutingHealth's counting adds to a step. *card*: while the steps ran. The parts of each case by phase:
[{name}.md](../benchmarks/results/{name}.md).

{step_table(found)}
The kernels of one step, forward and backward, by part of the model:

{parts_tables(step_rows_of(found))}"""


def trainer_table(found: Record) -> str:
    rows = [TrainerRow(**row) for row in found["rows"]]
    defaults = {row.mode: row.step_ms for row in rows if row.backend == DEFAULT and not row.skipped}
    heads = [
        "mode",
        "experts",
        "perf/mfu",
        "by events",
        "ratio",
        "perf/tokens_per_s",
        "perf/peak_memory, GiB",
    ]
    heads += ["step ms", "faster", "loss"]
    lines = []
    for row in rows:
        if row.skipped:
            lines.append([row.mode, row.backend, *["-"] * 7, f"skipped: {row.skipped}"])
            continue
        default = defaults.get(row.mode)
        lines.append(
            [
                row.mode,
                row.backend,
                _percent(row.mfu_logged),
                _percent(row.mfu_clocked),
                f"{row.mfu_logged / row.mfu_clocked:.3f}",
                f"{row.tokens_per_s:,.0f}",
                _number(row.peak_gib, ".1f"),
                f"{row.step_ms:.1f}",
                f"{default / row.step_ms:.2f} x" if default else "-",
                f"{row.loss:.4f}",
            ]
        )
    return table(heads, lines)


def trainer_section(record: Record) -> str:
    found = record["trainer"]
    notes = {row["note"]: None for row in found["rows"] if row["note"]}
    return f"""\
{environment_line(record)}.

{describe_cut(found)}
TRL {found["trl"]}'s SFTTrainer with its own defaults (fp32 weights, bf16 autocast, gradient checkpointing,
clipped gradients), but for an optimizer that does nothing: AdamW's state would not fit. Medians of
{found["steps"]} steps. *perf/...*: what PerformanceCallback logs. *by events*: the same MFU from a clock
around the steps.

{trainer_table(found)}{"".join(f"{chr(10)}```{chr(10)}{note}{chr(10)}```{chr(10)}" for note in notes)}"""


def curves_table(found: Record) -> str:
    rows = [CurveRow(**row) for row in found["rows"]]
    defaults = {row.weights: row.deviation for row in rows if row.backend == DEFAULT}
    lines = []
    for row in rows:
        default = defaults.get(row.weights)
        ratio = f"**{row.deviation / default:.2f}**" if default else "-"
        losses = f"{row.loss:.4f}", f"{row.exact_loss:.4f}"
        weights = {"fp32": "fp32, bf16 autocast"}.get(row.weights, row.weights)
        lines.append([weights, row.backend, row.seeds, f"{row.deviation:.2e}", ratio, *losses])
    heads = ["weights", "experts", "seeds", "deviation", "of the default's", "last loss", "fp32's last loss"]
    return table(heads, lines)


def curves_section(record: Record) -> str:
    found = record["curves"]
    skipped = "".join(f"\nSkipped: {run}: {why}.\n" for run, why in found["skipped"].items())
    return f"""\
{environment_line(record)}.

{found["steps"]} steps of AdamW on text, {found["parameters"]:,} parameters. The deviation is that of a step's
loss from the same seed's in fp32 (the default's experts, no autocast), the median over all steps and seeds.
The last loss is the mean of the last tenth.

{curves_table(found)}{skipped}"""
