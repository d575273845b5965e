"""Pictures and numbers of a finished run: the loss curve, the experts' load, `report.json`."""

from __future__ import annotations

import importlib
import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastexperts.errors import FastexpertsError
from fastexperts.train.recipe import Recipe
from fastexperts.train.sft import TrainResult


def describe_run(recipe: Recipe, result: TrainResult) -> dict[str, Any]:
    """What was trained, on what, and how it went, as plain JSON values."""
    trainer = result.trainer
    history = trainer.state.log_history
    return {
        "versions": {
            name: importlib.import_module(name).__version__
            for name in ("fastexperts", "torch", "transformers", "trl")
        },
        "python": platform.python_version(),
        "device": device_name(trainer.args.device),
        "threads": torch.get_num_threads(),
        "recipe": recipe.model_dump(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "losses": result.losses,
        "eval_losses": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "performance": _medians(history),
        "routing": result.routing.as_json(),
    }


def _medians(history: list[dict[str, float]]) -> dict[str, float]:
    """What the meter logged (metrics/mfu.py), the median of each value: a slow start does not count."""
    names = sorted({name for entry in history for name in entry if name.startswith("perf/")})
    return {name: median(entry[name] for entry in history if name in entry) for name in names}


def device_name(device: torch.device) -> str:
    """The card's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, readable by people."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def plot_loss(path: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> None:
    """The loss curve as PNG."""
    figure, axes = _figure(7, 4)
    axes.plot(*zip(*losses, strict=True), label="training")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), "o-", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_expert_load(path: Path, load_LE: torch.Tensor) -> None:
    """The share of each layer's routed tokens that each expert got, as a heatmap, as PNG; 1 is the mean."""
    relative = load_LE.double() / load_LE.double().mean(1, keepdim=True).clamp(min=1)
    figure, axes = _figure(max(5, 0.35 * load_LE.shape[1]), max(2.5, 0.35 * load_LE.shape[0] + 1.2))
    image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", ylabel="layer", title="Tokens per expert, relative to the layer's mean")
    axes.set_yticks(range(load_LE.shape[0]))
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def check_plotting() -> None:
    """Raise FastexpertsError, before hours of training rather than after, if pictures cannot be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise FastexpertsError("plots need matplotlib: pip install 'fastexperts[plot]'") from error


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Figure by itself, without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
