"""What a run prints: one progress bar on a terminal, a line per log elsewhere, and nothing on other ranks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class RichProgress(TrainerCallback):
    """A progress bar with the latest loss; give it the console that everything else prints to."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar where the run stands."""
        if state.is_world_process_zero:
            self._task = self._progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, status=""
            )
            if self._console.is_terminal:
                self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the newest loss."""
        losses = {name: logs[name] for name in ("loss", "eval_loss") if logs and name in logs}
        if self._task is None or not losses:
            return
        status = "  ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
        self._progress.update(self._task, status=status)
        if not self._console.is_terminal:
            self._console.print(f"step {state.global_step}/{state.max_steps}  {status}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar as it is."""
        self._progress.stop()
