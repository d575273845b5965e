"""docs/support.md, drawn from what the tests of each family did: `make support`.

    python tests/support_matrix.py REPORT [PAGE]      REPORT: pytest's --junitxml

A test that fills a cell calls `cell`. A cell is the worst of its tests; without any it says "not run".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
COLUMNS = (
    "full",
    "LoRA",
    "checkpointing",
    "compile",
    "export",
    "FSDP2",
    "tensor parallel",
    "expert parallel",
)
_PROPERTY = "support"
_WORST_FIRST = ("FAILS", "refused", "n/a", "yes")
_NOT_RUN = "not run"

_HEAD = """\
# Support

Drawn by `make support` from what the tests did with transformers {transformers}, PEFT {peft} and torch
{torch}; not edited by hand. A row is a class of experts that transformers dispatches, found in its source, in
a tiny model of its family that reads text (no images, no sound).

| column | "yes" says |
| --- | --- |
| full | output and every gradient within 1e-5 of transformers' eager experts (relative Frobenius, fp32) |
| LoRA | as full, PEFT of rank 4 on both projections, against PEFT over eager experts; no weight is folded |
| checkpointing | as full, with `use_reentrant=False`; the layers ran twice |
| compile | as full, an experts layer of the model with `fullgraph=True` |
| export | `save_pretrained`, `from_pretrained`: bitwise the same weights, the same output within 1e-6 |
| FSDP2, tensor parallel, expert parallel | loss and every gradient within 1e-5 of those of one process |

The last three: 2 and 4 processes on a CPU, through transformers' `DistributedConfig`, expert parallel by
all-reduce and by all-to-all. Transformers leaves the experts of gpt_oss whole under tensor parallelism.

"refused": `enable` raises and says why (below). "n/a": transformers' model itself cannot. "not run": no test.

"""


@dataclass
class Row:
    """A class of experts: what its tests recorded."""

    model: str = ""
    activation: str = ""
    cells: dict[str, list[str]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def cell(self, column: str) -> str:
        """The worst outcome of the tests of a column."""
        seen = self.cells.get(column, [])
        return next((outcome for outcome in _WORST_FIRST if outcome in seen), _NOT_RUN)


def cell(
    record_property: Callable[[str, object], None],
    column: str,
    family: str,
    experts: str = "",
    **says: str,
) -> None:
    """Make the outcome of the calling test a cell of the matrix, or several; called first, so that a failure
    is one too.

    Args:
        record_property: pytest's fixture.
        column: one of COLUMNS.
        family: the folder in transformers.models.
        experts: the class; without it the outcome is that of every class of the family.
        says: `model` or `activation` of the row.
    """
    if column not in COLUMNS:
        raise ValueError(f"{column} is none of {COLUMNS}")
    record_property(_PROPERTY, f"{family}/{experts}/{column}")
    for name, value in says.items():
        record_property(name, value)


def rows_of(report: Path) -> dict[tuple[str, str], Row]:
    """(family, experts) -> row, of a junit report."""
    rows: dict[tuple[str, str], Row] = {}
    whole: list[tuple[str, str, str]] = []
    for test in ET.parse(report).iter("testcase"):
        said = {p.get("name", ""): p.get("value", "") for p in test.iter("property")}
        outcome, reason = _outcome(test)
        for filled in (p.get("value", "") for p in test.iter("property") if p.get("name") == _PROPERTY):
            family, experts, column = filled.split("/")
            if not experts:
                whole.append((family, column, outcome))
                continue
            row = rows.setdefault((family, experts), Row())
            row.model, row.activation = said.get("model", row.model), said.get("activation", row.activation)
            row.cells.setdefault(column, []).append(outcome)
            if reason:
                row.reasons.append(reason)
    for family, column, outcome in whole:
        for key, row in rows.items():
            if key[0] == family:
                row.cells.setdefault(column, []).append(outcome)
    return dict(sorted(rows.items()))


def _outcome(test: ET.Element) -> tuple[str, str]:
    """(what the cell says, why if it is not "yes")."""
    if test.find("failure") is not None or test.find("error") is not None:
        return "FAILS", ""
    skipped = test.find("skipped")
    if skipped is None:
        return "yes", ""
    return "refused" if skipped.get("type") == "pytest.xfail" else "n/a", skipped.get("message", "")


def page(rows: dict[tuple[str, str], Row]) -> str:
    """The matrix as Markdown, the reasons of what is not served below it."""
    head = _HEAD.format(**{name: version(name) for name in ("transformers", "peft", "torch")})
    header = ("family", "model", "experts", "activation", *COLUMNS)
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    reasons: dict[str, dict[str, None]] = {}
    for (family, experts), row in rows.items():
        cells = (family, f"`{row.model}`", f"`{experts}`", row.activation or "-", *map(row.cell, COLUMNS))
        lines.append(f"| {' | '.join(cells)} |")
        for reason in row.reasons:
            reasons.setdefault(reason, {})[f"`{experts}`"] = None
    counts = ", ".join(f"{c} {sum(row.cell(c) == 'yes' for row in rows.values())}" for c in COLUMNS)
    notes = [f"- {', '.join(names)}: {reason}" for reason, names in sorted(reasons.items())]
    return "\n".join([f"{head}{len(rows)} classes: {counts}.\n", *lines, *[""][: len(notes)], *notes, ""])


def main() -> int:
    report, to = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else PAGE
    rows = rows_of(report)
    to.write_text(page(rows), encoding="utf-8")
    failing = [
        f"{experts}: {c}" for (_, experts), row in rows.items() for c in COLUMNS if row.cell(c) == "FAILS"
    ]
    print(f"{to}: {len(rows)} classes, {len(failing)} cells fail", *failing, sep="\n  ")
    return int(bool(failing) or not rows)


if __name__ == "__main__":
    sys.exit(main())
