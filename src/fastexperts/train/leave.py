"""How a process of several ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import torch.distributed as dist


def leave(trainer: Any) -> None:
    """End the training of `trainer`, a transformers Trainer; of several processes over gloo, end this one.

    What DistributedDataParallel leaves for the interpreter's exit frees its group there, which holds
    Python's lock while it waits for gloo's threads, and they may wait for that lock: PyTorch 2.13 then
    hangs or aborts now and then (docs/run.md). So the process ends here, after its exit handlers.
    """
    accelerator = trainer.accelerator
    if not (dist.is_initialized() and dist.get_backend() == "gloo" and dist.get_world_size() > 1):
        accelerator.end_training()
        return
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
