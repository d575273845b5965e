"""The figures of the layer's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import DEFAULT, OURS, Row, dense_of, shares

_COLOURS = {
    "dense": "0.7",
    OURS: "tab:orange",
    f"{OURS}-fp32": "tab:orange",
    f"{OURS}-pointers": "tab:orange",
}


def plot_layer(rows: list[Row], path: Path) -> None:
    """Bars of one problem: forward + backward."""
    plt = _pyplot()
    rows = [row for row in rows if not row.skipped]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    speeds = [row.tflops[1] for row in rows]
    colours = [_COLOURS.get(row.implementation, "tab:blue") for row in rows]
    bars = axis.barh([row.implementation for row in rows], speeds, color=colours)
    texts = [f"{speed:.0f}   {row.step_ms:.2f} ms" for row, speed in zip(rows, speeds, strict=True)]
    axis.bar_label(bars, texts, padding=3)
    axis.invert_yaxis()
    axis.set_xlim(right=1.2 * max(speeds))
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("TF/s, forward + backward (higher is faster)")
    axis.set_title(f"{rows[0].shape}, {rows[0].tokens:,} tokens, {rows[0].routing} routing, bf16")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_shapes(rows: list[Row], path: Path) -> None:
    """A panel a shape: share of dense over T, forward + backward."""
    plt = _pyplot()
    dense = dense_of(rows)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    columns = min(4, len(shapes))
    figure, axes = plt.subplots(
        -(-len(shapes) // columns), columns, figsize=(3 * columns, 2.6 * -(-len(shapes) // columns)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        for name, colour in ((OURS, "tab:orange"), (DEFAULT, "tab:blue")):
            for kind, style in (("balanced", "-o"), ("skewed", "--s")):
                points = [
                    (row.tokens, share[1])
                    for row in rows
                    if (row.shape, row.routing, row.implementation) == (shape, kind, name)
                    if (share := shares(row, dense.get(row.where)))
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, ms=4, label=f"{name}, {kind}")
        axis.set_title(shape, fontsize=10)
        axis.set_xscale("log", base=2)
        ticks = sorted({row.tokens for row in rows})
        axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("share of dense, forward + backward", fontsize=10)
    figure.supxlabel("tokens", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
