"""The numbers of a finished run, as plain JSON values: what `report.json` holds and `page` draws."""

from __future__ import annotations

import importlib
import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastexperts.metrics.mfu import PerformanceCallback
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
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "recipe": recipe.model_dump(exclude=set() if recipe.training.method == "lora" else {"lora"}),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "losses": result.losses,
        "eval_losses": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "performance": _medians(history),
        "mfu_not_logged": _mfu_not_logged(trainer),
        "series": _series(history),
        "routing": result.routing.as_json(),
    }


def _medians(history: list[dict[str, float]]) -> dict[str, float]:
    """What the meter logged (metrics/mfu.py), the median of each value: a slow start does not count."""
    return {
        name: median(value for _, value in points)
        for name, points in _series(history).items()
        if name.startswith("perf/")
    }


def _series(history: list[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Name of what our callbacks logged -> (step, value) of each log."""
    names = sorted({name for entry in history for name in entry if name.startswith(("perf/", "routing/"))})
    return {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names}


def _mfu_not_logged(trainer: Any) -> str | None:
    meters = (each for each in trainer.callback_handler.callbacks if isinstance(each, PerformanceCallback))
    return next((meter.not_logged for meter in meters), None)


def device_name(device: torch.device) -> str:
    """The card's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, readable by people."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
