"""What routers do with their experts in a training run: load, entropy and logits in any Trainer's logs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastexperts.errors import refuse
from fastexperts.metrics.expert_load import ExpertLoad
from fastexperts.metrics.router_logits import RouterLogits
from fastexperts.metrics.tokens import TrainedTokens

FILE = "routing_health.json"
WORST: dict[str, Callable[[list[float]], float]] = {
    "load_cv": max,
    "max_violation": max,
    "dead_experts": max,
    "entropy": min,
    "entropy_normalized": min,
    "logit_norm": max,
}
"""What is logged -> which of the layers' values is the worst."""
Values = list[float | None]
"""A value for each layer; None where it is not known, as of a layer without tokens."""


@dataclass
class RoutingTable:
    """Every layer's health over a run."""

    layers: list[str]
    """Names of the experts modules, in the model's order."""
    experts: list[int]
    """Experts of each layer."""
    load_LE: Tensor
    """Routed tokens of all processes, `[layers, experts]` int64, since this process started or resumed."""
    logs: list[dict[str, Any]] = field(default_factory=list)
    """For each log its `step` and, by the names in WORST and `busiest_share`, `Values`."""

    def as_json(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return vars(self) | {"load_LE": self.load_LE.tolist()}

    def save(self, path: Path) -> None:
        """Write it, over an older one."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json()) + "\n", encoding="utf-8")
        partial.replace(path)

    def take_up(self, path: Path, step: int) -> None:
        """Put the logs up to `step` of a run that is continued before this one's."""
        if not path.is_file():
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["layers"] == self.layers:
            self.logs = [entry for entry in earlier["logs"] if entry["step"] <= step] + self.logs


class RoutingHealth(TrainerCallback):
    """Logs `routing/...` with each training loss, and warns when a router collapses.

        trainer = SFTTrainer(model, ...)
        RoutingHealth().attach(trainer)

    Per layer, about the tokens since the last log, padding excluded, of all processes together:

    load_cv: the experts' load, standard deviation over mean
    max_violation: the busiest expert's load over the mean, less 1 (MaxVio of arXiv 2408.15664); 0 is even
    dead_experts: share of experts without a token
    entropy: of the router's probabilities, mean over tokens, in nats; entropy_normalized: over its largest
        value, the log of the number of experts. 1 is undecided, 0 is one expert for sure
    logit_norm: root mean square of the router's logits. Large ones round badly and saturate the router
        (ST-MoE, arXiv 2202.08906, whose z-loss holds them down)

    The mean over layers has the plain name, `routing/load_cv`; the worst layer's value ends in `_worst`.
    `routing/worst_layer` is the number in the name of the layer with the largest max_violation. `table` has
    every layer; the first process writes it into the run's folder at each save and at the end, as FILE.

    A router has collapsed if, `patience` logs in a row, as many experts as a token has get more than
    `max_share` of the load together, so that nearly all tokens go to the same ones, or if its normalized
    entropy is below `min_entropy`. Said once for each layer.
    """

    def __init__(
        self,
        *,
        max_share: float = 0.9,
        min_entropy: float = 0.05,
        patience: int = 10,
        say: Callable[[str], object] = print,
    ) -> None:
        """`say` gets warnings, and what cannot be logged, on the first process."""
        for name, value in (("max_share", max_share), ("min_entropy", min_entropy)):
            if not 0 <= value <= 1:
                way_out = "Leave it out for the default."
                raise refuse("RoutingHealth", name, got=value, needs="a share, 0 to 1", way_out=way_out)
        if patience < 1:
            way_out = "Leave it out for the default."
            raise refuse("RoutingHealth", "patience", got=patience, needs="logs, at least 1", way_out=way_out)
        self.table: RoutingTable | None = None
        self._max_share, self._min_entropy, self._patience, self._say = max_share, min_entropy, patience, say
        self._tokens: TrainedTokens | None = None
        self._load: ExpertLoad | None = None
        self._routers: RouterLogits | None = None
        self._suspected: list[int] = []
        self._warned: set[int] = set()

    def attach(self, trainer: Any) -> RoutingHealth:
        """Add it to `trainer` before its other callbacks, so that trackers such as TensorBoard log it too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Watch the experts and their routers."""
        self._stop()
        tokens = TrainedTokens(model)
        load = ExpertLoad(model, tokens)
        self.table = RoutingTable(list(load.layers), load.experts, load.counts())
        if not load.layers:
            reason = "the model has no experts in transformers' interface."
            self._say_first(args, f"Routing health is not logged: {reason}")
            return
        if args.n_gpu > 1:
            reason = "DataParallel runs copies of the model. Start a process for each GPU."
            self._say_first(args, f"Routing health is not logged: {reason}")
            return
        routers = RouterLogits(model, load.layers, tokens)
        lacking = len(load.layers) - len(routers.routers)
        if lacking:
            self._say_first(
                args,
                f"Router logits are not logged for {lacking} of {len(load.layers)} layers: "
                "transformers does not tell where they are.",
            )
        self._tokens, self._load, self._routers = tokens, load, routers
        for each in (tokens, routers, load):
            each.start()
        if state.global_step > 0:
            self.table.take_up(Path(args.output_dir) / FILE, state.global_step)
        self._suspected, self._warned = [0] * len(load.layers), set()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the values to a training step's logs."""
        if self._load is None or self.table is None or logs is None or "loss" not in logs:
            return
        by_layer = self._take(args)
        self.table.logs.append({"step": state.global_step, **by_layer})
        values = summarize(self.table.layers, by_layer)
        logs.update(values)
        state.log_history[-1].update(values)
        self._warn(args, by_layer)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the table."""
        if self.table is not None and args.process_index == 0:
            self.table.save(Path(args.output_dir) / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count what came after the last log, write the table, and watch no more."""
        if self._load is not None:
            self._take(args)
            self.on_save(args, state, control)
        self._stop()

    def _take(self, args: Any) -> dict[str, Values]:
        """Values of each layer since the last call, of all processes, in one transfer."""
        assert self._load is not None
        assert self._routers is not None
        assert self.table is not None
        # Counts are exact in fp64.
        parts = [self._load.table(args.device).double(), self._routers.table(args.device)]
        self._load.reset()
        self._routers.reset()
        sums = torch.cat(parts, dim=1)
        if args.world_size > 1:
            torch.distributed.all_reduce(sums)
        load_LE, router_L3 = sums.cpu().split([parts[0].shape[1], 3], dim=1)
        self.table.load_LE += load_LE.long()
        top_k = [self._load.top_k.get(name, 1) for name in self.table.layers]
        columns = [self._routers.columns.get(name, 1) for name in self.table.layers]
        return load_values(load_LE, self.table.experts, top_k) | router_values(router_L3, columns)

    def _warn(self, args: Any, by_layer: dict[str, Values]) -> None:
        assert self.table is not None
        assert self._load is not None
        for layer, name in enumerate(self.table.layers):
            share, entropy = by_layer["busiest_share"][layer], by_layer["entropy_normalized"][layer]
            k, experts = self._load.top_k.get(name, 1), self.table.experts[layer]
            complaints = []
            if share is not None and share > self._max_share > k / experts:
                complaints.append(f"{k} of its {experts} experts get {share:.0%} of the load")
            if entropy is not None and entropy < self._min_entropy:
                complaints.append(f"its entropy is {entropy:.3f} of the largest possible")
            self._suspected[layer] = self._suspected[layer] + 1 if complaints else 0
            if self._suspected[layer] >= self._patience and layer not in self._warned:
                self._warned.add(layer)
                logs = "1 log" if self._patience == 1 else f"{self._patience} logs in a row"
                self._say_first(args, f"Router collapse: {name}: {' and '.join(complaints)}, after {logs}.")

    def _say_first(self, args: Any, line: str) -> None:
        if args.process_index == 0:
            self._say(line)

    def _stop(self) -> None:
        for each in (self._tokens, self._load, self._routers):
            if each is not None:
                each.stop()
        self._tokens = self._load = self._routers = None


def load_values(load_LE: Tensor, experts: list[int], top_k: list[int]) -> dict[str, Values]:
    """What `load_LE` [layers, experts] says of each layer, which has `experts` of its columns."""
    names = ("load_cv", "max_violation", "dead_experts", "busiest_share")
    found: dict[str, Values] = {name: [] for name in names}
    for row_E, size, k in zip(load_LE.double(), experts, top_k, strict=True):
        load_E = row_E[:size]
        mean = float(load_E.mean())
        values: tuple[float | None, ...] = (None,) * len(names)
        if mean > 0:
            busiest = float(load_E.max())
            deviation = float(load_E.std(correction=0))
            dead = float((load_E == 0).double().mean())
            share = float(load_E.topk(min(k, size)).values.sum() / load_E.sum())
            values = deviation / mean, busiest / mean - 1, dead, share
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return found


def router_values(router_L3: Tensor, columns: list[int]) -> dict[str, Values]:
    """What the sums of `RouterLogits.table` say of each layer, which has `columns` to choose among."""
    found: dict[str, Values] = {name: [] for name in ("entropy", "entropy_normalized", "logit_norm")}
    for (tokens, entropies, squares), size in zip(router_L3.tolist(), columns, strict=True):
        entropy = entropies / tokens if tokens else None
        square = squares / tokens if tokens and not math.isnan(squares) else None
        found["entropy"].append(entropy)
        found["entropy_normalized"].append(None if entropy is None or size < 2 else entropy / math.log(size))
        found["logit_norm"].append(None if square is None else math.sqrt(square))
    return found


def summarize(layers: list[str], by_layer: dict[str, Values]) -> dict[str, float]:
    """What is logged of the layers' values: mean and worst of what is known, and which layer is worst."""
    logged: dict[str, float] = {}
    for name, worst in WORST.items():
        known = [value for value in by_layer[name] if value is not None]
        if known:
            logged |= {f"routing/{name}": sum(known) / len(known), f"routing/{name}_worst": worst(known)}
    violations = zip(by_layer["max_violation"], layers, strict=True)
    worst_of_all = max(((value, name) for value, name in violations if value is not None), default=None)
    number = re.search(r"\.(\d+)\.", worst_of_all[1]) if worst_of_all else None
    if number:
        logged["routing/worst_layer"] = float(number[1])
    return logged
