"""Resume that loses nothing: expert weights go through transformers' own conversion, and a lost key is fatal.

Checkpoints store experts one by one (`experts.3.up_proj.weight`), models hold them fused
(`experts.gate_up_proj`). `from_pretrained` converts; `Trainer`'s resume and its load of the best model call
`load_state_dict(strict=False)` on the file instead, so that every expert keeps its initial weights and a
warning is all there is (transformers #48805). No callback runs before those loads (`on_train_begin` comes
after the weights, the optimizer and the wrapping), and none is told the folder: what can be mended is the
trainer's own loading.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from fastexperts.errors import refuse
from fastexperts.train.adapter import check_saved

AnyTrainer = TypeVar("AnyTrainer")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def fix_resume(trainer: AnyTrainer) -> AnyTrainer:
    """Make `trainer.train(resume_from_checkpoint=...)` and its best-model load exact; returns the trainer.

        trainer = fix_resume(Trainer(model, args, ...))   # any transformers or TRL trainer
        trainer.train(resume_from_checkpoint=True)

    FSDP, DeepSpeed and PEFT checkpoints are not per-expert: they keep the trainer's own loading. In each case
    a missing or unexpected key raises FastexpertsError instead of being warned about, and an adapter is
    compared with its file afterwards, since PEFT passes over keys that it does not know. A checkpoint of the
    last step is loaded and not trained on: the trainer itself asks whether it is done only after a step.
    """
    target: Any = trainer
    stock_load, stock_load_best = target._load_from_checkpoint, target._load_best_model
    stock_epoch = target._run_epoch

    @functools.wraps(stock_epoch)
    def run_epoch(*args: Any, **kwargs: Any) -> None:
        if target.state.global_step < target.state.max_steps:
            stock_epoch(*args, **kwargs)
        else:
            target.control.should_training_stop = True

    @functools.wraps(stock_load)
    def load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        if _stores_per_expert(target):
            load_weights(target.model if model is None else model, resume_from_checkpoint)
        else:
            stock_load(resume_from_checkpoint, model)
            if _is_whole_adapter(target):
                check_saved(target.model, resume_from_checkpoint)

    @functools.wraps(stock_load_best)
    def load_best_model() -> None:
        if _stores_per_expert(target):
            load_weights(target.model, target.state.best_model_checkpoint)
        else:
            stock_load_best()
            if _is_whole_adapter(target):
                check_saved(target.model, target.state.best_model_checkpoint)

    def issue_warnings_after_load(load_result: Any) -> None:
        ignored = set(getattr(target.model, "_keys_to_ignore_on_save", None) or ())
        missing = set(load_result.missing_keys)
        if missing and missing == ignored:
            target.model.tie_weights()
            missing = set()
        _refuse_lost_keys("the checkpoint", missing, set(load_result.unexpected_keys))

    target._run_epoch = run_epoch
    target._load_from_checkpoint = load_from_checkpoint
    target._load_best_model = load_best_model
    target._issue_warnings_after_load = issue_warnings_after_load
    return trainer


def load_weights(model: Any, checkpoint: str | Path) -> None:
    """Load a checkpoint's weights into `model` in place, exactly, through `from_pretrained`'s conversion.

    Raises FastexpertsError if a weight is missing, unexpected or misshapen; the model is as it was.
    """
    import torch

    kinds = {parameter.dtype for parameter in model.parameters()}
    # fp32 holds every narrower dtype exactly, where the weights do not share one.
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    try:
        loaded, info = type(model).from_pretrained(
            str(checkpoint), config=copy.deepcopy(model.config), dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise refuse(
            "resume",
            str(checkpoint),
            got=f"a checkpoint that does not load ({' '.join(str(error).split())[:300]})",
            needs=f"one that this {type(model).__name__} wrote",
            way_out="Resume an earlier checkpoint, or with the settings that the run was started with.",
        ) from error
    _refuse_lost_keys(str(checkpoint), set(info["missing_keys"]), set(info["unexpected_keys"]))
    model.load_state_dict(loaded.state_dict(), strict=True)


def last_checkpoint(run: str | Path, world_size: int = 1) -> tuple[Path | None, dict[Path, list[str]]]:
    """The last complete checkpoint of a run, or None; and what each newer one lacks.

    A process killed while it saves leaves a folder that looks like a checkpoint: what is missing or cut short
    in it decides, not its name.
    """
    numbered = {}
    for path in Path(run).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            numbered[int(match.group(1))] = path
    incomplete: dict[Path, list[str]] = {}
    for step in sorted(numbered, reverse=True):
        missing = missing_parts(numbered[step], world_size)
        if not missing:
            return numbered[step], incomplete
        incomplete[numbered[step]] = missing
    return None, incomplete


def missing_parts(checkpoint: Path, world_size: int = 1) -> list[str]:
    """What a checkpoint lacks to be resumed from by `world_size` processes; empty if it is complete."""
    # The first rank writes its trainer state last, and the other ranks their random states meanwhile.
    needed = ["scheduler.pt", "trainer_state.json"]
    needed += ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    missing = []
    # FSDP and DeepSpeed keep weights and optimizer in folders of their own, which they check themselves.
    if not any(path.name.startswith(("pytorch_model_fsdp", "global_step")) for path in checkpoint.iterdir()):
        needed.append("optimizer.pt")
        missing += _missing_weights(checkpoint)
    missing += [name for name in needed if not (checkpoint / name).is_file()]
    if "trainer_state.json" not in missing and _read_json(checkpoint / "trainer_state.json") is None:
        missing.append("the end of trainer_state.json")
    return missing


def _missing_weights(checkpoint: Path) -> list[str]:
    shards = [name for name in WEIGHTS if (checkpoint / name).is_file()]
    for index in INDEXES:
        if (checkpoint / index).is_file():
            shards += sorted(
                set((_read_json(checkpoint / index) or {}).get("weight_map", {"": index}).values())
            )
    if not shards:
        return ["the weights"]
    return [name for name in shards if not _is_whole(checkpoint / name)]


def _is_whole(path: Path) -> bool:
    """Whether a weights file is as long as its own header says (safetensors), or opens (others)."""
    if not path.is_file():
        return False
    if path.suffix != ".safetensors":
        return path.stat().st_size > 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _stores_per_expert(trainer: Any) -> bool:
    from transformers import PreTrainedModel

    wrapped = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return not wrapped and isinstance(trainer.model, PreTrainedModel)


def _is_whole_adapter(trainer: Any) -> bool:
    """Whether one process holds an adapter that its checkpoints hold as it is, and no other beside it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or find_spec("peft") is None:
        return False
    from peft import PeftModel

    return isinstance(trainer.model, PeftModel) and len(trainer.model.peft_config) == 1


def _refuse_lost_keys(source: str, missing: set[str], unexpected: set[str]) -> None:
    lost = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    if missing or unexpected:
        shown = ", ".join(f"{kind}: {names[:5]} of {len(names)}" for kind, names in lost.items() if names)
        raise refuse(
            "resume",
            source,
            got=f"keys that do not match the model's ({shown})",
            needs="each of the model's weights, and no others",
            way_out="Resume with the model and transformers version that wrote the checkpoint.",
        )
