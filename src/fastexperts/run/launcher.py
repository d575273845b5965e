"""The launcher of `fastexperts run`: the child's environment, its signals, its exit code, and the report."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastexperts.errors import refuse
from fastexperts.run.report import draw, read

# Schedulers send the last two before the end.
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(command: Sequence[str], *, say: Callable[[str], object] | None = None) -> int:
    """Run `command` with fastexperts switched on for the MoE models that its Python processes load.

    The command has this process's terminal, folder and environment, and signals sent to this process. Returns
    its exit code, 128 + n if signal n ended it. `say` gets the report at the end; default: stderr.
    Raises FastexpertsError if there is no such command.
    """
    _check(command)
    with TemporaryDirectory(prefix="fastexperts-run-") as folder:
        # Copied: each process finds the folder for its findings by where this file lies.
        shutil.copyfile(Path(__file__).with_name("startup.py"), Path(folder, "sitecustomize.py"))
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        with _forwarding() as children:
            children.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}))
            code = children[0].wait()
        ended = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        report = draw(f"fastexperts run: `{shlex.join(command[:2])}` {ended}.", read(folder))
    (say or _print)(report)
    return code if code >= 0 else 128 - code


def _print(report: str) -> None:
    print(report, file=sys.stderr, flush=True)


def _check(command: Sequence[str]) -> None:
    way_out = "Write it as in a shell: fastexperts run -- trl sft --model_name_or_path ..."
    if not command:
        raise refuse("run", "command", got="nothing", needs="a command to run", way_out=way_out)
    if shutil.which(command[0]) is None:
        if Path(command[0]).is_file():
            way_out = f"Start it with its interpreter: fastexperts run -- python {command[0]} ..."
        needs = "the name of an installed program, or the path of an executable file"
        raise refuse("run", "command", got=repr(command[0]), needs=needs, way_out=way_out)


@contextmanager
def _forwarding() -> Iterator[list[subprocess.Popen[Any]]]:
    """Inside, signals sent to this process go to the children in the list, and leave this process waiting."""
    children: list[subprocess.Popen[Any]] = []

    def forward(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    def leave(number: int, _: object) -> None:
        pass

    # The terminal sends Ctrl-C to its whole foreground group: a second one would cut the child's cleanup off.
    handlers = dict.fromkeys(FORWARDED, forward) | {signal.SIGINT: leave if _in_foreground() else forward}
    # What is ignored stays so, here and in the child: nohup.
    heard = {number for number in handlers if signal.getsignal(number) is not signal.SIG_IGN}
    previous = {number: signal.signal(number, handlers[number]) for number in heard}
    try:
        yield children
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether a terminal sends its interrupts to this process and its children."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)
