"""A training process for tests: `python train_process.py RECIPE [--resume] [--kill-at STEP]`."""

import argparse
import os
import signal

from transformers import TrainerCallback

from fastexperts.train.leave import leave
from fastexperts.train.recipe import load_recipe
from fastexperts.train.sft import train


class KillAt(TrainerCallback):
    """kill -9 at the end of a step: nothing is flushed, no handler runs."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    options = parser.parse_args()
    killer = [KillAt(options.kill_at)] if options.kill_at else []
    result = train(load_recipe(options.recipe), resume=options.resume, callbacks=killer)
    leave(result.trainer)
