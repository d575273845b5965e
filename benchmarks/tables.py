"""What every section of the report writes with."""

from __future__ import annotations

from collections.abc import Iterable

from results import Record


def table(heads: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    heads = list(heads)
    rows = [heads, ["---"] * len(heads), *([str(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def environment_line(record: Record) -> str:
    """Card and versions; the command stands by itself."""
    values = {name: value for name, value in record["environment"].items() if name != "command"}
    card = values.pop("card")
    return ", ".join([card, *(f"{name} {value}" for name, value in values.items())])
