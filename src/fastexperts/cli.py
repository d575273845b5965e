"""The command line, `fastexperts train RECIPE.yaml` and the like: thin calls into the library."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from fastexperts.errors import FastexpertsError

app = typer.Typer(
    help="Train mixture-of-experts models on fused experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run; it has to be new or empty.")
]
NewFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the result; it has to be new or empty.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(help="The adapter's model, a folder or a name on the hub; default: what the adapter names."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastexperts {import_module('fastexperts').__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe; examples/recipe.yaml explains each setting.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the recipe's output_dir.")
    ] = False,
    output: Output = None,
    steps: Steps = None,
) -> None:
    """Train a model as a recipe says; under `accelerate launch` or `torchrun`, as one of its processes."""
    quiet_libraries()
    from fastexperts.train.recipe import load_recipe

    changes: dict[str, Any] = {"output_dir": str(output.resolve())} if output else {}
    if steps is not None:
        changes |= {"training.steps": steps, "training.epochs": None}
    checked = load_recipe(recipe, **changes)
    from fastexperts.train.leave import leave
    from fastexperts.train.sft import train as run

    result = run(checked, resume=resume)
    if result.trainer.is_world_process_zero():
        from fastexperts.train.page import write_report
        from fastexperts.train.report import describe_run

        written = "the report of the run that was finished already"
        if result.steps or not (result.folder / "report.json").exists():
            written = write_report(result.folder, describe_run(checked, result), "Training run")
        step, loss = result.losses[-1]
        done = result.trainer.state.global_step
        typer.echo(
            f"Loss {loss:.4f} (step {step}) after {done} steps; {result.model_folder}\n"
            f"In {result.folder}: {written}"
        )
    leave(result.trainer)


@app.command()
def demo(output: Output = None, steps: Steps = None) -> None:
    """Train a small model on the standard library's text and prove the result against plain transformers."""
    # Everything is at hand: no hub is asked, and none can delay the start.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    from fastexperts.train.demo import STEPS, run_demo

    if not run_demo(output, steps=steps or STEPS).passed:
        typer.echo("Error: a check failed, see the table. Please report it, with report.json.", err=True)
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a checkpoint to stack.")],
    output: NewFolder,
    to: Annotated[str, typer.Option(help="peft, per-expert, merged, scattermoe or qwen3-moe-fused.")],
    base: BaseModel = None,
    check: Annotated[
        str, typer.Option(help="Of merged: logits, or weights where the model is too large to run.")
    ] = "logits",
) -> None:
    """Write an adapter in another layout, or merged into its model; it is kept if it reads back right."""
    quiet_libraries()
    from fastexperts.hf.export import export_to

    _report(export_to(source, to, output, base=base, check=check))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint or an adapter.")],
    output: NewFolder,
    layout: Annotated[str, typer.Option("--from", help="scattermoe or qwen3-moe-fused.")],
    base: BaseModel = None,
) -> None:
    """Bring a checkpoint or adapter with stacked experts into transformers' and PEFT's own layout."""
    quiet_libraries()
    from fastexperts.hf.export import import_from

    _report(import_from(source, layout, output, base=base))


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="As in a shell: trl sft --model_name_or_path ...")],
) -> None:
    """Run another trainer's COMMAND with fastexperts switched on for the models it loads: docs/run.md."""
    from fastexperts.run.launcher import run as launch

    raise typer.Exit(launch(command))


def _report(exported: Any) -> None:
    for line in (*exported.checks, *exported.notes):
        typer.echo(line)
    typer.echo(f"Done: {exported.folder}")


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and advice: this process prints one bar and its results."""
    import datasets
    import transformers

    # Names that change with transformers' versions are TRL's business as much as ours.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    datasets.disable_progress_bars()
    # It logs what it raises, and what it raises becomes our one message.
    datasets.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main() -> None:
    """The console script: what users can repair exits with 2 and one message, without a traceback."""
    try:
        app()
    except FastexpertsError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
