"""A recipe's training run: TRL's SFTTrainer trains; here is what goes into it and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.checkpoint import new_folder
from fastexperts.hf.optimize import PARTS, Part, StepSummary, optimize
from fastexperts.metrics.routing_health import RoutingHealth, RoutingTable
from fastexperts.train.adapter import adapter_of, check_saved
from fastexperts.train.data import check_isolation, load_documents
from fastexperts.train.models import load_model, load_tokenizer
from fastexperts.train.recipe import Recipe, TrainingSettings
from fastexperts.train.resume import fix_resume
from fastexperts.train.rundir import claim, find_start

MODEL_FOLDER = "model"
BASE_FOLDER = "base"
Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    trainer: Any
    """TRL's trainer, as `train` left it: model, optimizer, `state.log_history`."""
    routing: RoutingTable
    """What its routers did, layer by layer, in the steps of this process."""
    steps: int
    """Optimizer steps of this process: all of the run's, or those since it was resumed."""
    folder: Path
    """The run's folder: `recipe.yaml`, `checkpoint-<step>`, the trained `model`, and with `method: lora` from
    scratch the `base` of the adapter.
    """

    @property
    def model_folder(self) -> Path:
        """The trained model, or adapter, and the tokenizer, as `save_pretrained` writes them."""
        return self.folder / MODEL_FOLDER

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of each log."""
        return [(entry["step"], entry["loss"]) for entry in self.trainer.state.log_history if "loss" in entry]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train as the recipe says, in this process or as one rank of `accelerate launch` or `torchrun`.

    Args:
        recipe: what `load_recipe` gives.
        resume: continue the run in `recipe.output_dir` from its last complete checkpoint, bitwise as if it
            had not stopped. Otherwise the folder has to be new or empty.
        console: where the first rank prints.
        callbacks: more of transformers' TrainerCallbacks.

    Raises FastexpertsError for whatever cannot be served as asked.
    """
    trainer, checkpoint, console = _prepare(recipe, resume, console or Console(), callbacks)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    folder = Path(recipe.output_dir)
    trainer.save_model(str(folder / MODEL_FOLDER))
    trainer.accelerator.wait_for_everyone()
    if recipe.training.method == "lora":
        for note in _on_first_rank(trainer.args, lambda: _read_back(trainer, folder / MODEL_FOLDER)):
            console.print(note, highlight=False, soft_wrap=True)
    before = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    return TrainResult(trainer, _routing(trainer), trainer.state.global_step - before, folder)


def _prepare(
    recipe: Recipe, resume: bool, console: Console, callbacks: Sequence[Any]
) -> tuple[Any, Path | None, Console]:
    """The trainer, ready to train, and the checkpoint to start from; the run's folder is claimed last."""
    arguments = sft_config(recipe)
    if arguments.process_index != 0:
        console = Console(quiet=True)
    start = _on_first_rank(
        arguments, lambda: find_start(recipe, resume=resume, world_size=arguments.world_size)
    )
    tokenizer = load_tokenizer(recipe.model)
    documents = load_documents(recipe.data, recipe.training.seed)
    if documents.column == "messages" and tokenizer.chat_template is None:
        raise refuse(
            "recipe",
            "model.tokenizer",
            got="a tokenizer without a chat template, for chat messages",
            needs="one with a chat template",
            way_out="Name the tokenizer of an instruction-tuned model in `model.tokenizer`.",
        )
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    model = load_model(recipe.model, tokenizer, dtype, recipe.training.seed)
    _check_auxiliary_loss(recipe.training, model.config.get_text_config())
    if recipe.training.method == "lora":
        model.requires_grad_(False)  # as PEFT will, and as the estimate of memory has to count
    optimized = _optimize(recipe, model)
    callbacks = [*callbacks, *_balancing(recipe.training, model, console)]
    adapter = None
    if recipe.training.method == "lora":
        adapter, summary = adapter_of(recipe.lora, model)
        console.print(str(summary), highlight=False, soft_wrap=True)
    trainer = make_trainer(arguments, model, tokenizer, documents, console, callbacks, adapter)
    if adapter is not None and recipe.training.optimize.adapters:  # it has made them
        optimized = optimized.with_rows(*PARTS["adapters"](trainer.model, arguments.device.type))
    console.print(str(optimized), highlight=False, soft_wrap=True)
    if adapter is not None and recipe.lora.experts and recipe.lora.check_gradients:
        _check_gradients(trainer, console)
    if recipe.data.packing:
        _prove_isolation(trainer, console)
    for note in _on_first_rank(arguments, lambda: claim(recipe, start)):
        console.print(note, highlight=False, soft_wrap=True)
    if adapter is not None and recipe.model.config is not None:
        _keep_base(recipe, trainer, tokenizer, dtype)
    return trainer, start.checkpoint, console


def _optimize(recipe: Recipe, model: Any) -> StepSummary:
    """Put the fast parts in; the loss is the trainer's, and the attention backend the recipe's."""
    settings = recipe.training
    where = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(where, dtype=torch.bfloat16, enabled=_autocasts(settings)):
        summary = optimize(
            model,
            parts={
                **settings.optimize.model_dump(),
                "loss": False,
                "attention": recipe.model.attention == "sdpa",
            },
            checkpoint=settings.checkpoint,
            tokens=settings.batch_size * recipe.data.max_length,
            verbose=False,
        )
    return summary.with_rows(Part("loss", True, "TRL's own fused LM head"))


def make_trainer(
    arguments: Any,
    model: Any,
    tokenizer: Any,
    documents: Any,
    console: Console,
    callbacks: Sequence[Any] = (),
    adapter: Any = None,
) -> Any:
    """TRL's SFTTrainer over checked documents, with our progress bar, our meters and our resume.

    adapter: a `peft.LoraConfig`, if one is trained.
    """
    from jinja2 import TemplateError
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from fastexperts.metrics.mfu import PerformanceCallback
    from fastexperts.train.progress import RichProgress

    try:
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=documents.train,
            eval_dataset=documents.evaluation,
            callbacks=[RichProgress(console), *callbacks],
            peft_config=adapter,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise FastexpertsError(f"train: TRL refuses these settings: {error}") from error
    except OSError as error:  # it makes the folder
        raise refuse(
            "train",
            "output_dir",
            got=f"{arguments.output_dir} ({error})",
            needs="a folder that can be written",
            way_out="Choose another one.",
        ) from error
    except TemplateError as error:
        raise refuse(
            "train",
            "data.messages_column",
            got=f"messages that the tokenizer's chat template does not take ({error})",
            needs="messages as this template writes them",
            way_out="Change them, or name another tokenizer in `model.tokenizer`.",
        ) from error
    trainer.remove_callback(PrinterCallback)
    for meter in (PerformanceCallback, RoutingHealth):
        meter(say=_sayer(console)).attach(trainer)
    if len(trainer.train_dataset) == 0:
        raise refuse(
            "train",
            "data",
            got="no sequence to learn from once tokenized",
            needs="some",
            way_out="Give more text, or a larger `data.max_length`.",
        )
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise refuse(
            "train",
            "model",
            got="a model without a trainable parameter",
            needs="some",
            way_out="Set `requires_grad` of what is to be trained, or `training.method: lora`.",
        )
    return fix_resume(trainer)


def _sayer(console: Console) -> Callable[[str], object]:
    return partial(console.print, highlight=False, soft_wrap=True)


def _balancing(settings: TrainingSettings, model: Any, console: Console) -> list[Any]:
    from fastexperts.train.balancing import LossFreeBalancing, find_biases

    if settings.balancing is None:
        return []
    find_biases(model)  # what is refused is refused before anything is written
    return [LossFreeBalancing(settings.balancing.rate, say=_sayer(console))]


def _routing(trainer: Any) -> RoutingTable:
    """What `make_trainer`'s RoutingHealth saw."""
    tables = (each.table for each in trainer.callback_handler.callbacks if isinstance(each, RoutingHealth))
    return next(table for table in tables if table is not None)


def sft_config(recipe: Recipe) -> Any:
    """The recipe as TRL's SFTConfig; what the recipe does not say keeps TRL's default."""
    from trl import SFTConfig

    settings, data = recipe.training, recipe.data
    evaluates = data.eval_fraction > 0
    reports: list[str] = (
        [settings.report_to] if isinstance(settings.report_to, str) else list(settings.report_to)
    )
    _check_installed(reports)
    _check_optimizer(settings.optimizer)
    return SFTConfig(
        output_dir=recipe.output_dir,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        seed=settings.seed,
        data_seed=settings.seed,
        gradient_checkpointing=False,  # the model has it already, as `optimize` has set it
        bf16=_autocasts(settings),
        use_cpu=not torch.cuda.is_available(),
        router_aux_loss_coef=settings.router_aux_loss_coef,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        save_steps=settings.save_steps,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps if evaluates else None,
        report_to=reports,
        disable_tqdm=True,
        max_length=data.max_length,
        packing=data.packing,
        # TRL's default strategy drops what is longer than max_length; this one cuts it in pieces.
        packing_strategy="bfd_split",
        assistant_only_loss=data.assistant_only_loss,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataset_text_field="text",
    )


def _autocasts(settings: TrainingSettings) -> bool:
    on_gpu = torch.cuda.is_available()
    if on_gpu and settings.precision != "fp32" and not torch.cuda.is_bf16_supported():
        raise refuse(
            "recipe",
            "training.precision",
            got=f"{settings.precision!r} on {torch.cuda.get_device_name()}, which has no bf16",
            needs="a GPU with bf16 (compute capability 8.0 or newer), or fp32",
            way_out="Set `training.precision: fp32`.",
        )
    return settings.precision == "bf16_autocast" or (settings.precision == "auto" and on_gpu)


def _check_installed(reports: list[str]) -> None:
    from importlib.util import find_spec

    for name in reports:
        if (
            name != "none"
            and find_spec(name) is None
            and not (name == "tensorboard" and find_spec("tensorboardX"))
        ):
            raise refuse(
                "recipe",
                "training.report_to",
                got=f"{name!r}, which is not installed",
                needs="an installed tracker",
                way_out=f"pip install {name}, or set it to none.",
            )


def _check_optimizer(name: str) -> None:
    from importlib.util import find_spec

    if name.endswith("_8bit") and find_spec("bitsandbytes") is None:
        raise refuse(
            "recipe",
            "training.optimizer",
            got=f"{name!r}, and bitsandbytes is not installed",
            needs="bitsandbytes",
            way_out="pip install bitsandbytes, or choose another optimizer.",
        )


def _check_auxiliary_loss(settings: TrainingSettings, config: Any) -> None:
    # deepseek_v3 and its like have router logits to return, and no load-balancing loss made of them.
    if settings.router_aux_loss_coef and not hasattr(config, "router_aux_loss_coef"):
        raise refuse(
            "recipe",
            "training.router_aux_loss_coef",
            got=f"{settings.router_aux_loss_coef} for {config.model_type}, which has no auxiliary loss",
            needs="a model with one",
            way_out="Leave it out.",
        )


def _on_first_rank(arguments: Any, act: Callable[[], Result]) -> Result:
    """Act once, on the first rank; every rank gets the result or raises the error."""
    outcome: list[Any] = [None, None]
    if arguments.process_index == 0:
        try:
            outcome[0] = act()
        except FastexpertsError as error:
            outcome[1] = str(error)
    if arguments.world_size > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise FastexpertsError(outcome[1])
    result: Result = outcome[0]
    return result


def _check_gradients(trainer: Any, console: Console) -> None:
    from fastexperts.train.gradients import ExpertGradients

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        console.print("Gradients: those of experts' factors are not checked under FSDP or DeepSpeed.")
        return
    trainer.add_callback(ExpertGradients(_sayer(console)))


def _keep_base(recipe: Recipe, trainer: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """Save the model from scratch that the adapter belongs to, and name it in the adapter's config."""
    folder = Path(recipe.output_dir) / BASE_FOLDER
    for config in trainer.model.peft_config.values():
        config.base_model_name_or_path = str(folder)
    if trainer.is_world_process_zero() and not folder.exists():
        # It depends on the seed alone. The trainer's own has the adapter between its modules.
        model = load_model(recipe.model, tokenizer, dtype, recipe.training.seed)
        with new_folder(folder, "train") as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)


def _read_back(trainer: Any, folder: Path) -> list[str]:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return ["Adapter: what was saved is not read back under FSDP or DeepSpeed."]
    return [f"Adapter: {check_saved(trainer.model, folder)} tensors saved, and read back bit by bit."]


def _prove_isolation(trainer: Any, console: Console) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        console.print("Packing: isolation of documents is not checked under FSDP or DeepSpeed.")
        return
    with trainer.accelerator.autocast():
        difference = check_isolation(
            trainer.model, trainer.model.config.get_text_config().vocab_size, trainer.model
        )
    console.print(f"Packing: documents are isolated (a neighbour moves logits by {difference:.1e}).")
