"""The recipe: every setting of a training run, read from YAML and checked before anything is loaded."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.lora import MAX_RANK
from fastexperts.train.plain_yaml import read_yaml

TinyConfig = Literal["tiny-qwen3-moe", "tiny-mixtral", "tiny-deepseek-v3"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "lion_8bit", "sgd"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
# YAML 1.1 reads a bare `off` as false.
Checkpoint = Annotated[
    Literal["auto", "off", "keep-attention", "keep-experts", "full"],
    BeforeValidator(lambda value: "off" if value is False else value),
]

# Settings that a resumed run may change: none of them changes what the next step computes.
RESUME_MAY_CHANGE = frozenset(
    {
        "output_dir",
        "training.logging_steps",
        "training.save_steps",
        "training.eval_steps",
        "training.keep_checkpoints",
        "training.report_to",
        "lora.check_gradients",
    }
)


def invalid(got: object, needs: str, way_out: str) -> PydanticCustomError:
    """A validator's complaint, in the parts that the final message names."""
    return PydanticCustomError("recipe", "invalid", {"got": got, "needs": needs, "way_out": way_out})


def _a_file_name(value: str) -> str:
    if not value.strip():
        raise invalid("an empty text", "a path", "Name a file or folder.")
    return value


PathText = Annotated[str, AfterValidator(_a_file_name)]


class Section(BaseModel):
    """Base of every section: strict types, finite numbers, no unknown keys, no change after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Which model is trained: a checkpoint (`path`), or a small one from scratch (`config`)."""

    path: PathText | None = Field(default=None, description="folder of a checkpoint, or its name on the hub")
    config: TinyConfig | None = Field(default=None, description="a named small model, from scratch")
    overrides: dict[str, Any] = Field(default={}, description="settings of `config` to change")
    tokenizer: PathText | None = Field(
        default=None, description="default: the checkpoint's, or bytes for `config`"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.path is None) == (self.config is None):
            got = "neither `path` nor `config`" if self.path is None else "both `path` and `config`"
            raise invalid(got, "exactly one of them", "Set `path` (a checkpoint) or `config` (from scratch).")
        if self.overrides and self.config is None:
            raise invalid("`overrides` beside `path`", "`config`", "A checkpoint's shape is fixed: drop it.")
        return self


class DataSettings(Section):
    """What it is trained on: local files (`files`), or a dataset's name (`dataset`)."""

    files: PathText | list[PathText] | None = Field(
        default=None, description=".txt, .md, .jsonl, .json or .parquet"
    )
    dataset: PathText | None = Field(default=None, description="name of a dataset on the hub, or its folder")
    split: str = Field(default="train", description="split of `dataset`")
    text_column: str = "text"
    messages_column: str = Field(default="messages", description="used when the data has it: chat messages")
    document: Literal["file", "paragraph", "line"] = Field(
        default="file", description="one document of a text file"
    )
    eval_fraction: float = Field(
        default=0.0, ge=0, le=0.5, description="share of documents held out for evaluation"
    )
    max_length: int = Field(default=1024, ge=8, description="tokens of one sequence")
    packing: bool = Field(
        default=True, description="fill sequences with whole documents, isolated from each other"
    )
    assistant_only_loss: bool = Field(
        default=False, description="learn the assistant's turns only (chat messages)"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.files is None) == (self.dataset is None):
            got = "neither `files` nor `dataset`" if self.files is None else "both `files` and `dataset`"
            raise invalid(got, "exactly one of them", "Set `files` for local data or `dataset` for a name.")
        if isinstance(self.files, list) and not self.files:
            raise invalid("an empty list as `files`", "at least one file", "Name the files to train on.")
        return self


class OptimizeSettings(Section):
    """Parts of the step (hf/optimize.py): all but `adapters` are Liger's kernels, on a GPU."""

    norms: bool = True
    rotary: bool = True
    shared_experts: bool = Field(default=True, description="and other dense MLPs")
    adapters: bool = Field(default=True, description="LoRA of linear layers")


class BalancingSettings(Section):
    """Loss-free balancing of the experts' load (train/balancing.py), for families with a bias for it."""

    rate: float = Field(default=1e-3, gt=0, le=1, description="what a router's bias moves in a step")


class TrainingSettings(Section):
    """How it is trained. What is not here keeps TRL's default."""

    method: Literal["full", "lora"] = "full"
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; set this or `epochs`")
    epochs: float | None = Field(default=None, gt=0, description="passes over the data; default 1")
    batch_size: int = Field(default=8, ge=1, description="sequences per device and micro-step")
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0, le=1)
    scheduler: Scheduler = "linear"
    warmup: float = Field(default=0.0, ge=0, description="steps, or a share of all steps if below 1")
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Optimizer = "adamw_torch_fused"
    seed: int = Field(default=42, ge=0, lt=2**32)
    optimize: OptimizeSettings = OptimizeSettings()
    checkpoint: Checkpoint = Field(
        default="auto", description="what is computed again to save memory; auto: by an estimate"
    )
    precision: Literal["auto", "fp32", "bf16_autocast", "bf16"] = Field(
        default="auto", description="auto: fp32 weights, with bf16 autocast on a GPU; bf16: bf16 weights"
    )
    router_aux_loss_coef: float | None = Field(
        default=None, ge=0, description="default: the model's own; 0: none"
    )
    balancing: BalancingSettings | None = Field(
        default=None, description="loss-free balancing, like {rate: 1e-3}; default: none"
    )
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    eval_steps: int = Field(default=500, ge=1, description="used when data.eval_fraction is not 0")
    keep_checkpoints: int | None = Field(
        default=None, ge=1, description="older ones are deleted; default: keep all"
    )
    report_to: Tracker | list[Tracker] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSettings:
        if self.steps is not None and self.epochs is not None:
            raise invalid("both `steps` and `epochs`", "one of them", "Remove one of them.")
        if self.balancing is not None and self.method != "full":
            way_out = "Remove `balancing`, or set `method: full`."
            raise invalid("`balancing` beside an adapter, which would not save it", "`method: full`", way_out)
        return self


class LoraSettings(Section):
    """What an adapter trains, with `training.method: lora`."""

    r: int = Field(default=16, ge=1, le=MAX_RANK, description="rank of each update, per expert")
    alpha: float | None = Field(default=None, gt=0, description="updates are scaled by alpha / r; default: r")
    experts: bool = Field(default=True, description="the routed experts, all of them")
    attention: bool = True
    shared_experts: bool = False
    router: bool = False
    check_gradients: bool = Field(
        default=True, description="stop if an expert's factor gets no gradient in the first steps"
    )

    @model_validator(mode="after")
    def _something(self) -> LoraSettings:
        if not (self.experts or self.attention or self.shared_experts or self.router):
            raise invalid("nothing to adapt", "at least one part of the model", "Set `experts: true`.")
        return self


class Recipe(Section):
    """A whole training run: `train(recipe)` needs nothing else."""

    model: ModelSettings
    data: DataSettings
    training: TrainingSettings = TrainingSettings()
    lora: LoraSettings = LoraSettings()
    output_dir: PathText

    @model_validator(mode="after")
    def _used(self) -> Recipe:
        if "lora" in self.model_fields_set and self.training.method != "lora":
            way_out = "Set `training.method: lora`, or remove the section `lora`."
            raise invalid(
                f"`lora` beside `method: {self.training.method}`", "settings that are used", way_out
            )
        return self


def _closest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean `{match[0]}`?" if match else f"Known: {', '.join(f'`{key}`' for key in known)}."


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that a location's last key belongs to."""
    section: type[BaseModel] = Recipe
    for key in location[:-1]:
        field = section.model_fields.get(str(key))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        section = kind
    return section


_CALLED = {"gradient_checkpointing": "checkpoint", "activation_checkpointing": "checkpoint"}  # by TRL


def _where_it_may_belong(location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    if name in _CALLED:
        return f"Here it is `{_CALLED[name]}`."
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields:
            return f"`{name}` belongs into `{section}`."
    return _closest(name, list(_section_at(location).model_fields))


_NEEDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "dict": "settings, one `name: value` a line",
    "model": "settings, one `name: value` a line",
}


def _complaint(error: ErrorDetails) -> tuple[str, str, str]:
    """(got, needs, way out) of one of pydantic's errors."""
    kind, context, got = error["type"], error.get("ctx", {}), repr(error["input"])
    description = None
    if error["loc"]:
        field = _section_at(error["loc"]).model_fields.get(str(error["loc"][-1]))
        description = field.description if field else None
    hint = f"({description})" if description else "Change it in the recipe."
    if kind == "recipe":
        return str(context["got"]), str(context["needs"]), str(context["way_out"])
    if kind == "extra_forbidden":
        return "an unknown setting", "a known one", _where_it_may_belong(error["loc"])
    if kind == "missing":
        return "nothing", "a value", f"Add it. {hint}" if description else "Add it to the recipe."
    if kind == "literal_error":
        known = re.findall(r"'([^']+)'", str(context["expected"]))
        way_out = _closest(error["input"], known) if isinstance(error["input"], str) else hint
        return got, f"one of {context['expected']}", way_out
    for prefix, needs in _NEEDS.items():
        if kind.startswith(prefix) and kind.endswith(("_type", "_parsing", "_from_float")):
            quoted = isinstance(error["input"], str) and prefix in {"int", "float"}
            return got, needs, "Write it without quotes, like 10 or 1e-4." if quoted else hint
    return got, f"a value {error['msg'].removeprefix('Input should be ')}", hint


def _refusal(error: ValidationError, where: str) -> FastexpertsError:
    """One message for all that is wrong, so that a recipe is not repaired one run at a time."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        # A union reports each of its branches: `files.str`, `files.list[...]`. The setting is what precedes.
        parts = [str(part) for part in detail["loc"]]
        name = ".".join(part for part in parts if re.fullmatch(r"\w+", part) and part not in {"str", "list"})
        got, needs, way_out = _complaint(detail)
        lines.setdefault(name, str(refuse(where, name or "recipe", got=got, needs=needs, way_out=way_out)))
    return FastexpertsError("\n".join(lines.values()))


def parse_recipe(settings: object, where: str = "recipe") -> Recipe:
    """Validate settings; raise one `FastexpertsError` that names everything wrong with them."""
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise refuse(where, "recipe", got=got, needs=_NEEDS["dict"], way_out="See examples/recipe.yaml.")
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise _refusal(error, where) from error


def load_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read a recipe; relative paths in it start at its folder.

    `changes` replace settings by their dotted names: `**{"training.steps": 10}`.
    """
    path = Path(path)
    settings = read_yaml(path)
    if isinstance(settings, dict):
        for dotted, value in changes.items():
            *sections, name = dotted.split(".")
            target: Any = settings
            for section in sections:
                target = target.setdefault(section, {}) if isinstance(target, dict) else None
            if isinstance(target, dict):  # the validation says what is wrong with another
                target[name] = value
    return with_absolute_paths(parse_recipe(settings, where=str(path)), path.parent)


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its relative paths resolved against `folder`; names of the hub stay as they are."""

    def local(text: str) -> str:
        return str((folder / Path(text).expanduser()).resolve())

    def local_if_there(text: str | None) -> str | None:
        # `org/name` is a hub name unless such a folder exists; `./x`, `../x` and `/x` are always paths.
        if text is None or not (text.startswith((".", "/", "~")) or (folder / text).exists()):
            return text
        return local(text)

    files = recipe.data.files
    data = {
        "files": [local(name) for name in ([files] if isinstance(files, str) else files)] if files else None,
        "dataset": local_if_there(recipe.data.dataset),
    }
    model = {name: local_if_there(getattr(recipe.model, name)) for name in ("path", "tokenizer")}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "model": recipe.model.model_copy(update=model),
            "output_dir": local(recipe.output_dir),
        }
    )


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `load_recipe` of it is the same recipe."""
    unused = set() if recipe.training.method == "lora" else {"lora"}
    return yaml.safe_dump(recipe.model_dump(exclude=unused), sort_keys=False, allow_unicode=True)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Settings, by dotted name, that differ and that a resumed run may not change."""

    def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in settings.items():
            nested = isinstance(value, dict) and key in {"model", "data", "training", "lora"}
            found |= flat(value, f"{key}.") if nested else {prefix + key: value}
        return found

    before, after = flat(old.model_dump()), flat(new.model_dump())
    changed = {name for name in before if before[name] != after[name]}
    return {name: (before[name], after[name]) for name in sorted(changed - RESUME_MAY_CHANGE)}
