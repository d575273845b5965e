"""Run folders: a new run never writes over anything, a resumed one continues exactly what is there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastexperts.errors import refuse
from fastexperts.train.recipe import Recipe, differences, dump_recipe, parse_recipe
from fastexperts.train.resume import last_checkpoint

RECIPE_FILE = "recipe.yaml"


class Start(NamedTuple):
    """Where a run starts: a checkpoint or None, and the newer checkpoints that are incomplete, with why."""

    checkpoint: Path | None
    incomplete: dict[Path, list[str]]


def find_start(recipe: Recipe, *, resume: bool, world_size: int = 1) -> Start:
    """Look at the recipe's output folder, and write nothing.

    Raises FastexpertsError if a new run would write over anything, or if there is nothing to resume.
    """
    run = Path(recipe.output_dir)
    if not resume:
        _check_free(run)
        return Start(None, {})
    _check_same_recipe(run, recipe)
    start = Start(*last_checkpoint(run, world_size))
    if start.checkpoint is None:
        lacks = "; ".join(f"{path.name} lacks {', '.join(what)}" for path, what in start.incomplete.items())
        raise refuse(
            "train",
            "--resume",
            got=f"{run}, which has no complete checkpoint{f' ({lacks})' if lacks else ''}",
            needs=f"one, written by {world_size} process(es) as now",
            way_out="Start again with another --output.",
        )
    return start


def claim(recipe: Recipe, start: Start) -> list[str]:
    """Make the folder this run's: write its recipe, or move half-written checkpoints aside. Returns notes."""
    run = Path(recipe.output_dir)
    if start.checkpoint is None:
        _check_free(run)
        try:
            run.mkdir(parents=True, exist_ok=True)
            (run / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
        except OSError as error:
            got, needs = f"{run} ({error.strerror})", "a folder that can be written"
            raise refuse(
                "train", "output_dir", got=got, needs=needs, way_out="Choose another one."
            ) from error
        return []
    notes = []
    for path, missing in start.incomplete.items():
        # Saving into it again could mix the files of two saves.
        aside = _free_name(path)
        path.rename(aside)
        notes.append(f"{path.name} is incomplete (no {', '.join(missing)}) and was moved to {aside.name}.")
    return [*notes, f"Resuming from {start.checkpoint}."]


def _check_free(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise refuse(
            "train", "output_dir", got=f"{run}, a file", needs="a folder", way_out="Choose another name."
        )
    if run.is_dir() and any(run.iterdir()):
        raise refuse(
            "train",
            "output_dir",
            got=f"{run}, which is not empty",
            needs="a new or empty folder",
            way_out="Pass --resume to continue that run, or --output with another folder.",
        )


def _check_same_recipe(run: Path, recipe: Recipe) -> None:
    import yaml

    saved = run / RECIPE_FILE
    if not saved.is_file():
        raise refuse(
            "train",
            "--resume",
            got=f"{run}, which holds no run of fastexperts",
            needs=f"a folder with {RECIPE_FILE} and checkpoints",
            way_out="Correct `output_dir` or --output, or start without --resume.",
        )
    before = parse_recipe(yaml.safe_load(saved.read_text(encoding="utf-8")), where=str(saved))
    changed = differences(before, recipe)
    if changed:
        shown = "; ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise refuse(
            "train",
            "--resume",
            got=f"a recipe that differs from the run's ({shown})",
            needs="the same settings",
            way_out=f"Restore them ({saved} has them all), or start a new run with --output.",
        )


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"incomplete-{path.name}-{number}")).exists():
        number += 1
    return aside
