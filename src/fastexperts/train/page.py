"""A run's report as one HTML file that opens offline: plots and tables of what `describe_run` gives."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastexperts.errors import FastexpertsError
from fastexperts.train.report import write_json

WAY_OUT = "pip install 'fastexperts[plot]'"
Points = Sequence[Sequence[float]]
"""(step, value) of each log."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f5f2; color: #22262b; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 56px; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 0 0 8px; font-size: 17px; }
.under { margin: 2px 0 20px; color: #666c73; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tiles div, section { background: #fff; border: 1px solid #e3e3dd; border-radius: 8px; padding: 14px 16px; }
.tiles b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tiles span, .note { color: #666c73; font-size: 13px; }
section { margin-top: 16px; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px;
  align-items: start; }
img { display: block; width: 100%; height: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13px; }
td, th { padding: 4px 12px 4px 0; border-top: 1px solid #eeeeea; text-align: left; vertical-align: top; }
th { border-top: 0; color: #666c73; font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.ok, .failed { overflow-wrap: normal; }
.ok { color: #1a7f37; font-weight: 600; }
.failed { color: #cf222e; font-weight: 700; }
blockquote { margin: 8px 0; padding-left: 12px; border-left: 3px solid #d8d8d0;
  font-family: ui-monospace, monospace; }
"""


def missing() -> str | None:
    """Why pages cannot be drawn here, or None."""
    return None if importlib.util.find_spec("matplotlib") else f"plots need matplotlib: {WAY_OUT}"


def check_plotting() -> None:
    """Raise FastexpertsError, before hours of training rather than after, if pages cannot be drawn."""
    if (reason := missing()) is not None:
        raise FastexpertsError(reason)


def write_report(folder: Path, report: dict[str, Any], title: str) -> str:
    """Write `report.json` into `folder`, and `report.html` if matplotlib is there; say what was written."""
    write_json(folder / "report.json", report)
    if (reason := missing()) is not None:
        return f"report.json; no report.html: {reason}"
    (folder / "report.html").write_text(page(report, title), encoding="utf-8")
    return "report.html, report.json"


def page(report: Mapping[str, Any], title: str) -> str:
    """The page of what `describe_run` gives, and of the demo's `checks` and `samples`."""
    series = report["series"]
    body = [
        f"<h1>{escape(title)}</h1><p class='under'>{escape(_subtitle(report))}</p>",
        _tiles(report),
        _section("Loss", _image(plot_loss(report["losses"], report["eval_losses"]), "the loss of each step")),
        *_proof(report),
        _pair(_throughput(series), _mfu(report)),
        *_routing(report),
        _section("Settings", _table(_flat(report["recipe"]))),
        _section("Versions", _table(_versions(report))),
    ]
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    inside = "\n".join(body)
    return (
        f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body><main>{inside}</main></body></html>\n"
    )


def plot_loss(losses: Points, eval_losses: Points) -> Any:
    """The loss of training and evaluation."""
    lines = {"training": losses} | ({"evaluation": eval_losses} if eval_losses else {})
    return plot_lines(lines, "nats per token", width=10, marked="evaluation", from_zero=False)


def plot_lines(
    lines: Mapping[str, Points],
    label: str = "",
    *,
    width: float = 5,
    marked: str = "",
    from_zero: bool = True,
) -> Any:
    """Values over steps, a line for each name, with dots for the `marked` one."""
    figure, axes = _figure(width, 3)
    for name, points in lines.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        # A single point makes no line.
        style = "o-" if name == marked or len(points) == 1 else "-"
        axes.plot(steps, values, style, label=name, markersize=4)
    axes.set(xlabel="step", ylabel=label)
    if from_zero:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    if len(lines) > 1:
        axes.legend(frameon=False)
    return figure


def plot_load(load_LE: Sequence[Sequence[int]], experts: Sequence[int], layers: Sequence[str]) -> Any:
    """Each expert's tokens over the mean of its layer, as a heatmap: white is 1."""
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    load = np.array(load_LE, dtype=float)
    there = np.arange(load.shape[1]) < np.array(experts)[:, None]
    mean = np.where(there, load, 0).sum(1, keepdims=True) / np.array(experts)[:, None]
    relative = np.where(there, load / np.maximum(mean, 1e-9), np.nan)
    figure, axes = _figure(10, min(7.0, max(1.8, 0.24 * len(layers) + 1)))
    norm = TwoSlopeNorm(1, vmin=0, vmax=max(2.0, float(np.nanmax(relative))))
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    every = -(-len(layers) // 24)
    labels = [_number(name, row) for row, name in enumerate(layers)]
    axes.set_yticks(range(0, len(layers), every), labels[::every])
    axes.set(xlabel="expert", ylabel="layer")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Figure by itself, without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _image(figure: Any, description: str) -> str:
    """The figure inside of the page, as SVG."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fastexperts"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{escape(description, quote=True)}' src='data:image/svg+xml;base64,{data}'>"


def _section(heading: str, content: str, note: str = "") -> str:
    under = f"<p class='note'>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(heading)}</h2>{content}{under}</section>"


def _pair(left: str, right: str) -> str:
    return f"<div class='pair'>{left}{right}</div>"


def _table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _subtitle(report: Mapping[str, Any]) -> str:
    model, training = report["recipe"]["model"], report["recipe"]["training"]
    how = {"full": "trained in full", "lora": "LoRA"}[training["method"]]
    where = report["device"] if report["processes"] == 1 else f"{report['processes']} x {report['device']}"
    name = model["config"] or model["path"]
    return f"{name}, {report['parameters']:,} parameters, {how}, {report['steps']:,} steps on {where}"


def _tiles(report: Mapping[str, Any]) -> str:
    performance, violation = report["performance"], report["series"].get("routing/max_violation")
    evaluation = report["eval_losses"]
    tiles = {
        "training loss, last": f"{report['losses'][-1][1]:.4f}" if report["losses"] else None,
        "evaluation loss, last": f"{evaluation[-1][1]:.4f}" if evaluation else None,
        "tokens per second, median": _formatted(performance.get("perf/tokens_per_s"), ",.0f"),
        "MFU, median": _formatted(performance.get("perf/mfu"), ".1%"),
        "peak memory, GiB": _formatted(performance.get("perf/peak_memory"), ".1f"),
        "max violation, last, mean of layers": f"{violation[-1][1]:.2f}" if violation else None,
    }
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items() if value)
    return f"<div class='tiles'>{shown}</div>"


def _formatted(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _throughput(series: Mapping[str, Points]) -> str:
    points = series.get("perf/tokens_per_s")
    if not points:
        return _section("Tokens per second", "", "Not logged.")
    figure = plot_lines({"tokens": points})
    return _section("Tokens per second", _image(figure, "tokens per second over steps"))


def _mfu(report: Mapping[str, Any]) -> str:
    points = report["series"].get("perf/mfu")
    if not points:
        reason = report["mfu_not_logged"] or "no batch was counted."
        return _section("Model FLOPs utilisation", "", f"Not logged: {reason}")
    lines = {"MFU": points, "HFU, with recomputation": report["series"]["perf/hfu"]}
    figure = plot_lines(lines, "share of the peak")
    return _section("Model FLOPs utilisation", _image(figure, "model FLOPs utilisation over steps"))


def _routing(report: Mapping[str, Any]) -> list[str]:
    routing, series = report["routing"], report["series"]
    if not routing["layers"]:
        return [_section("Routing", "", "Not logged: no experts in transformers' interface were found.")]
    heatmap = plot_load(routing["load_LE"], routing["experts"], routing["layers"])
    over_time = [
        _health(series, "max_violation", "Max violation", "busiest expert over the mean, less 1; 0 is even"),
        _health(
            series, "entropy_normalized", "Router entropy", "share of the largest; 0 is one expert for sure"
        ),
        _health(
            series, "dead_experts", "Dead experts", "share of experts without a token since the last log"
        ),
        _health(series, "logit_norm", "Router logits", "root mean square"),
    ]
    drawn = [each for each in over_time if each]
    pairs = [_pair(*[*drawn[at : at + 2], ""][:2]) for at in range(0, len(drawn), 2)]
    note = (
        "Tokens of each expert over the mean of its layer, of all processes, since the run was started or "
        "resumed: white is even, blue idle, red busy."
    )
    return [_section("Load of the experts", _image(heatmap, "each expert's load, by layer"), note), *pairs]


def _health(series: Mapping[str, Points], name: str, heading: str, note: str) -> str:
    if not series.get(f"routing/{name}"):
        return ""
    lines = {"mean of layers": series[f"routing/{name}"], "worst layer": series[f"routing/{name}_worst"]}
    figure = plot_lines(lines)
    return _section(heading, _image(figure, f"{heading.lower()} over steps"), note)


def _proof(report: Mapping[str, Any]) -> list[str]:
    """What the demo verified, and what its model writes."""
    sections = []
    if "checks" in report:
        header = "".join(f"<th>{name}</th>" for name in ("what", "measured", "at most", "", "detail"))
        rows = "".join(_check(check) for check in report["checks"])
        note = "The trained model against what it saved, loaded into plain transformers and computed in fp64."
        sections.append(_section("Proof", f"<table><tr>{header}</tr>{rows}</table>", note))
    if "samples" in report:
        quotes = "".join(f"<blockquote>{escape(sample)}</blockquote>" for sample in report["samples"])
        sections.append(_section("Sampled from the trained model", quotes))
    return sections


def _check(check: Mapping[str, Any]) -> str:
    verdict = "<td class='ok'>ok</td>" if check["passed"] else "<td class='failed'>FAILED</td>"
    numbers = f"<td>{check['measured']:.3g}</td><td>{check['limit']:.3g}</td>"
    return f"<tr><td>{escape(check['name'])}</td>{numbers}{verdict}<td>{escape(check['detail'])}</td></tr>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """(dotted name, value) of each setting that is set."""
    rows: list[tuple[str, object]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None and value != {}:
            rows.append((prefix + name, ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows


def _versions(report: Mapping[str, Any]) -> list[tuple[str, object]]:
    return [*report["versions"].items(), ("Python", report["python"]), ("threads", report["threads"])]


def _number(name: str, row: int) -> str:
    """The number in a layer's name, or its row."""
    number = re.search(r"\.(\d+)\.", name)
    return number[1] if number else str(row)
