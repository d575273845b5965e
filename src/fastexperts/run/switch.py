"""What `fastexperts run` does in a process of the command: switch models, meter Trainers, look for patches.

Everything is written down as it happens and nothing is left for the interpreter's exit, where work can block
a process whose peers have gone.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fastexperts.errors import FastexpertsError
from fastexperts.hf import outside
from fastexperts.hf.bypass import check_called, check_reached
from fastexperts.hf.experts import NAME, register, survey, switch
from fastexperts.hf.inventory import in_interface
from fastexperts.run.report import Finding, write

DEFAULTS = {"grouped_mm", "eager"}
"""What transformers runs where nobody chooses; eager where the other cannot run."""


class Switch:
    """Switches the models of this process, and writes to `folder` and to stderr what it did."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._on: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # experts seen -> on fastexperts
        self._busy = False
        write(folder, None)

    def patch(self, module: ModuleType) -> None:
        """Patch transformers' `modeling_utils` or `trainer_callback`, just imported."""
        if module.__name__.endswith("modeling_utils"):
            for name in ("from_pretrained", "_from_config"):  # what auto classes call of the model's class
                original = vars(module.PreTrainedModel)[name].__func__
                setattr(module.PreTrainedModel, name, classmethod(self._around_load(original)))
        else:
            handler = module.CallbackHandler
            handler.on_train_begin = self._before(handler.on_train_begin, self.training_begins)
            handler.on_train_end = self._before(handler.on_train_end, self.training_ends)

    def loaded(self, model: nn.Module, chosen: Iterable[str] = ()) -> None:
        """Switch `model`, unless the command has `chosen` implementations for it; dense models pass.

        A trainer that makes an implementation of its own the default (Unsloth) has chosen, too.
        """
        try:
            summary = survey(model)
        except (FastexpertsError, ImportError) as error:  # an old torch, transformers or PEFT
            self._note(Finding("old", detail=str(error)))
            return
        keep = " and ".join(map(repr, sorted({*chosen, *_running(model) - DEFAULTS - {NAME}})))
        if summary.served and not keep:
            switch(model, summary)
        kinds: Counter[Finding] = Counter()
        for row in summary.rows:
            self._on[model.get_submodule(row.name)] = row.served and not keep
            state = "kept" if keep else "switched" if row.served else "refused"
            detail = keep or (row.activation if row.served else row.reason)
            kinds[Finding(state, type(model).__name__, row.cls, 0, detail)] += 1
        self._note_kinds(kinds)

    def training_begins(self, handler: Any, *_: Any) -> None:
        """Switch what was built past `from_pretrained`, look for patches, and meter the training."""
        if not _is_transformers(handler.model):
            return
        if not self._experts(handler.model):
            self.loaded(handler.model, _running(handler.model) - {NAME, "grouped_mm"})
        self._look_again(handler.model)
        experts = self._experts(handler.model)
        if not experts:
            return
        on = sum(self._on[module] for module in experts.values())
        write(self._folder, Finding("trained", _name_of(handler.model), layers=on))
        from fastexperts.metrics.mfu import PerformanceCallback

        if not any(isinstance(callback, PerformanceCallback) for callback in handler.callbacks):
            handler.callbacks.insert(0, PerformanceCallback(say=_say))  # before the trackers

    def training_ends(self, handler: Any, args: Any, state: Any, *_: Any) -> None:
        """Look for patches once more, and note what was measured last."""
        if not _is_transformers(handler.model) or not self._experts(handler.model):
            return
        self._look_again(handler.model)
        logs = [entry for entry in state.log_history if "perf/tokens_per_s" in entry]
        if logs and state.is_world_process_zero:
            values = (f"{key} {value:.4g}" for key, value in logs[-1].items() if key.startswith("perf/"))
            write(self._folder, Finding("measured", _name_of(handler.model), detail=", ".join(values)))

    def _look_again(self, model: nn.Module) -> None:
        """Note the experts that were switched and that something else computes by now."""
        kinds: Counter[Finding] = Counter()
        for name, module in self._experts(model).items():
            reason = _bypass(model, name, module) if self._on[module] else None
            if reason is not None:
                self._on[module] = False
                kinds[Finding("conflict", _name_of(model), type(module).__name__, 0, reason)] += 1
        self._note_kinds(kinds)

    def _around_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            if self._busy:  # a part of the model being loaded, which is not whole yet
                return original(cls, *args, **kwargs)
            chosen = _chosen(args, kwargs)  # asked before: transformers writes its default into the config
            self._busy = True
            try:
                if NAME in chosen:
                    register()
                result = original(cls, *args, **kwargs)
            finally:
                self._busy = False
            self.loaded(result[0] if isinstance(result, tuple) else result, chosen - {NAME})
            return result

        return load

    def _before(self, original: Callable[..., Any], act: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(original)
        def event(handler: Any, *args: Any, **kwargs: Any) -> Any:
            act(handler, *args)
            return original(handler, *args, **kwargs)

        return event

    def _experts(self, model: nn.Module) -> dict[str, nn.Module]:
        """name -> module of the experts of `model` that were seen before."""
        return {name: module for name, module in model.named_modules() if module in self._on}

    def _note_kinds(self, kinds: Counter[Finding]) -> None:
        for kind, layers in kinds.items():
            self._note(Finding(kind.state, kind.model, kind.experts, layers, kind.detail))

    def _note(self, finding: Finding) -> None:
        write(self._folder, finding)
        _say(str(finding))


def _say(line: str) -> None:
    """Print `line` to stderr, on the first process of this machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"fastexperts: {line}", file=sys.stderr, flush=True)


def _is_transformers(model: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, nn.Module) and any(isinstance(m, PreTrainedModel) for m in model.modules())


def _name_of(model: nn.Module) -> str:
    """The class of the transformers model in `model`, which PEFT and others wrap."""
    from transformers import PreTrainedModel

    return next(type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel))


def _chosen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """The experts implementations that a call of `from_pretrained` or `_from_config` names, or its config."""
    asked = kwargs.get("experts_implementation")
    names: set[Any] = set(asked.values()) if isinstance(asked, dict) else {asked}
    for config in (*args, kwargs.get("config")):
        subconfigs = (getattr(config, key, None) for key in getattr(config, "sub_configs", ()))
        names |= {getattr(each, "_experts_implementation", None) for each in (config, *subconfigs)}
    return names - {None}


def _running(model: nn.Module) -> set[str]:
    """The experts implementations that the modules of `model` run."""
    experts: list[Any] = [module for module in model.modules() if in_interface(module)]
    return {module.config._experts_implementation for module in experts} - {None}


def _bypass(model: nn.Module, name: str, module: Any) -> str | None:
    """Why the experts `module`, once switched, are not computed by fastexperts; None if they are."""
    try:
        if not in_interface(module):
            check_called(model, name)
            return None if outside.is_switched(module) else "another forward stands in the place of ours"
        check_reached(model, name, module)
    except FastexpertsError as error:
        return str(error)
    running = module.config._experts_implementation
    return None if running == NAME else f"its experts implementation was set to {running!r}"
