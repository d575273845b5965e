"""What the processes of a command found, a line of JSON each, and the text made of it at the end."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SENTENCES = {
    "switched": "{model}: {layers} layers of {experts} on fastexperts ({detail})",
    "refused": "{model}: {layers} layers of {experts} not on fastexperts: {detail}",
    "kept": "{model}: {layers} layers of {experts} stay on {detail}, which the command chose",
    "conflict": "{model}: conflict, {layers} layers of {experts} were switched, then bypassed: {detail}",
    "trained": "{model}: training began with {layers} experts layers on fastexperts",
    "measured": "{model}: {detail} in the Trainer's last log",
    "missing": "not switched in {detail}",
    "old": "nothing is switched: {detail}",
}
"""State of a finding -> how it is told; in the order of the report."""


@dataclass(frozen=True)
class Finding:
    """One thing that a process did or saw: `state` is a key of SENTENCES, and its text names the rest."""

    state: str
    model: str = ""
    experts: str = ""
    layers: int = 0
    detail: str = ""

    def __str__(self) -> str:
        return SENTENCES[self.state].format(**asdict(self))


def write(folder: str | Path, finding: Finding | None) -> None:
    """Add a finding to this process's file; None says that the process was reached, and no more."""
    # A process may outlive the launcher and its folder.
    with contextlib.suppress(FileNotFoundError), Path(folder, f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(asdict(finding) if finding else {}) + "\n")


def read(folder: str | Path) -> dict[str, list[Finding]]:
    """process -> its findings, in their order."""
    found = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        # What follows the last line feed was cut off with its process.
        lines = path.read_text().split("\n")[:-1]
        found[path.stem] = [Finding(**fields) for fields in map(json.loads, lines) if fields]
    return found


def draw(title: str, found: dict[str, list[Finding]]) -> str:
    """The report: `title`, and a line for each kind of finding with how many processes made it."""
    times: Counter[Finding] = Counter()
    processes: defaultdict[Finding, set[str]] = defaultdict(set)
    for process, findings in found.items():
        times.update(findings)
        for finding in findings:
            processes[finding].add(process)
    order = list(SENTENCES)
    lines = [
        f"{finding}{_count(times[finding], len(processes[finding]))}"
        for finding in sorted(times, key=lambda finding: order.index(finding.state))
    ]
    return "\n  ".join([title, *lines, *_remarks(found, {finding.state for finding in times})])


def _count(times: int, processes: int) -> str:
    if times == 1:
        return ""
    return f" [{times} times]" if processes == 1 else f" [{times} times in {processes} processes]"


def _remarks(found: dict[str, list[Finding]], states: Iterable[str]) -> list[str]:
    """What is to be known beside the findings."""
    states = set(states)
    if not found:
        where = "that keeps PYTHONPATH (`python -E`, -I and -S do not)"
        return [f"Nothing was switched: no Python process {where} imported transformers on this machine."]
    if not states:
        return ["Nothing was switched: transformers loaded no mixture-of-experts model."]
    if "switched" in states and "trained" not in states:
        not_seen = "perf/* is not logged, and patches of the experts since then were not looked for"
        return [f"No transformers Trainer trained it: {not_seen}."]
    return []
