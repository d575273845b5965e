"""The recipe's documents as a `datasets.Dataset`, checked before TRL tokenizes them; and packing's proof."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.train.recipe import DataSettings

TEXT_SUFFIXES = {".txt", ".md"}
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


# Columns beside chat messages that TRL hands to the chat template: they change the text that is trained on.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


class Documents(NamedTuple):
    """What the trainer gets, in each part: the column `text`, or `messages` and what its template reads."""

    train: Any
    evaluation: Any | None
    column: str


def load_documents(settings: DataSettings, seed: int) -> Documents:
    """Load, check and split the recipe's data; raises FastexpertsError for what cannot be trained on."""
    dataset = _from_files(settings) if settings.files is not None else _from_name(settings)
    dataset, column = _checked(dataset, settings)
    if settings.eval_fraction == 0:
        return Documents(dataset, None, column)
    held_out = round(len(dataset) * settings.eval_fraction)
    if held_out < 1 or len(dataset) - held_out < 1:
        raise refuse(
            "recipe",
            "data.eval_fraction",
            got=f"{settings.eval_fraction} of {len(dataset)} document(s), which leaves one part empty",
            needs="at least one document in each part",
            way_out="Give more documents (see `data.document`), or set it to 0.",
        )
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return Documents(parts["train"], parts["test"], column)


def _from_files(settings: DataSettings) -> Any:
    from datasets import Dataset, concatenate_datasets

    names = [settings.files] if isinstance(settings.files, str) else settings.files or []
    paths = [Path(name) for name in names]
    for path in paths:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no such file"
            way_out = "Name the files in it." if path.is_dir() else "Paths start at the recipe's folder."
            raise refuse("recipe", "data.files", got=f"{path}, {got}", needs="files", way_out=way_out)
        if path.suffix not in TEXT_SUFFIXES | set(LOADERS):
            known = ", ".join(sorted(TEXT_SUFFIXES | set(LOADERS)))
            raise refuse(
                "recipe",
                "data.files",
                got=path,
                needs=f"one of {known}",
                way_out="Convert or rename the file.",
            )
    kinds = {LOADERS.get(path.suffix, "text") for path in paths}
    if len(kinds) > 1:
        raise refuse(
            "recipe",
            "data.files",
            got=f"{sorted(kinds)} mixed",
            needs="one kind",
            way_out="Convert to JSONL.",
        )
    if kinds == {"text"}:
        texts = [text for path in paths for text in _split(_read_text(path), settings.document)]
        return Dataset.from_dict({settings.text_column: texts})
    return concatenate_datasets([_load_table(path) for path in paths])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refuse(
            "recipe",
            "data.files",
            got=f"{path} ({error})",
            needs="UTF-8 text",
            way_out="Convert the file to UTF-8.",
        ) from error


def _split(text: str, document: str) -> list[str]:
    pieces = {
        "file": lambda: [text],
        "line": text.splitlines,
        "paragraph": lambda: re.split(r"\n\s*\n", text),
    }
    return [piece for piece in pieces[document]() if piece.strip()]


def _load_table(path: Path) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.stat().st_size == 0:
        raise _empty(str(path))
    try:
        # The loader takes patterns, and `[1]` in a name would be one.
        return load_dataset(LOADERS[path.suffix], data_files=glob.escape(str(path)), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise refuse(
            "recipe",
            "data.files",
            got=f"{path}, which cannot be read ({reason})",
            needs="one JSON object a line" if LOADERS[path.suffix] == "json" else "a Parquet table",
            way_out="Repair or convert the file.",
        ) from error


def _from_name(settings: DataSettings) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(settings.dataset, split=settings.split)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise refuse(
            "recipe",
            "data.dataset",
            got=f"{settings.dataset!r}, split {settings.split!r}, which cannot be loaded ({reason})",
            needs="a dataset on the hub or a folder of one, and one of its splits",
            way_out="Check both names and the network; for local files use `data.files`.",
        ) from error


def _checked(dataset: Any, settings: DataSettings) -> tuple[Any, str]:
    """The dataset reduced to the column that is trained on, after a look at every row of it."""
    source = str(settings.files or settings.dataset)
    if len(dataset) == 0:
        raise _empty(source)
    is_chat = settings.messages_column in dataset.column_names
    name = settings.messages_column if is_chat else settings.text_column
    if name not in dataset.column_names:
        raise refuse(
            "recipe",
            "data.text_column",
            got=f"{settings.text_column!r}, and the data has {dataset.column_names}",
            needs="a column of the data",
            way_out="Set `data.text_column`, or `data.messages_column` for chats.",
        )
    if settings.assistant_only_loss and not is_chat:
        raise refuse(
            "recipe",
            "data.assistant_only_loss",
            got=f"true, and {source} has no column {settings.messages_column!r}",
            needs="chat messages, which say who speaks",
            way_out="Give chat messages, or set it to false.",
        )
    beside = [each for each in TEMPLATE_COLUMNS if is_chat and each in dataset.column_names]
    dataset = dataset.select_columns([name, *beside])
    for each in (name, *beside):
        nulls = dataset.data.column(each).null_count
        if nulls and each != "tools":  # a chat without tools is one
            needs = "a value in every row"
            raise refuse(
                "recipe",
                f"data column {each}",
                got=f"{nulls} empty rows",
                needs=needs,
                way_out="Remove them.",
            )
    (_check_messages if is_chat else _check_text)(dataset, name)
    column = "messages" if is_chat else "text"
    return dataset.rename_column(name, column) if name != column else dataset, column


def _check_text(dataset: Any, name: str) -> None:
    kind = getattr(dataset.features[name], "dtype", None)
    if kind not in {"string", "large_string"}:
        raise refuse(
            "recipe",
            "data.text_column",
            got=f"{name!r}, a column of {kind or dataset.features[name]}",
            needs="a column of text",
            way_out="Choose another column.",
        )
    if not any(text.strip() for text in dataset[name]):
        raise _empty(f"column {name!r}")


def _check_messages(dataset: Any, name: str) -> None:
    for row, messages in enumerate(dataset[name]):
        good = isinstance(messages, list) and messages and all(_is_message(message) for message in messages)
        if not good:
            raise refuse(
                "recipe",
                "data.messages_column",
                got=f"{str(messages)[:120]} in row {row}",
                needs="a list of messages, each with `role` and `content`",
                way_out='Write [{"role": "user", "content": "..."}, ...].',
            )


def _is_message(message: Any) -> bool:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
        return False
    return message["content"] is not None or bool(message.get("tool_calls"))


def _empty(source: str) -> FastexpertsError:
    return refuse("recipe", "data", got=f"no documents in {source}", needs="some", way_out="Give it text.")


def check_isolation(model: Any, vocabulary: int, forward: Callable[..., Any]) -> float:
    """Prove on this model that packed documents do not see each other; returns the largest difference.

    Two sequences hold the same second document behind different first ones, with positions that restart, as
    TRL's padding-free batches have, and the second document's logits must agree. Whether they do depends on
    the model: transformers derives the block-diagonal mask from the positions, but a model whose layers
    ignore them (a recurrence, an attention without this mask) would leak in silence.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    half = 8
    first, other, second = torch.randint(vocabulary, (3, half), generator=generator)
    boundaries = torch.tensor([0, half, 2 * half], dtype=torch.int32, device=device)
    batch = {
        "position_ids": torch.arange(half, device=device).repeat(2)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": half,
        "max_length_k": half,
        "seq_idx": torch.arange(2, dtype=torch.int32, device=device).repeat_interleave(half)[None],
        "use_cache": False,
    }
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            forward(input_ids=torch.cat([start, second]).to(device)[None], **batch).logits[0, half:]
            for start in (first, other)
        ]
    model.train(training)
    difference = float((logits[0] - logits[1]).float().norm() / logits[0].float().norm())
    # Rounding alone gives about 1e-7 in fp32 and 1e-2 in bf16; a neighbour that is seen gives 0.1 and more.
    if not difference <= (1e-3 if logits[0].dtype == torch.float32 else 0.04):
        raise refuse(
            "train",
            "data.packing",
            got=f"a model whose documents see each other when packed (logits differ by {difference:.2g})",
            needs="a model and attention that isolate packed documents",
            way_out="Set `data.packing: false`, or try another `model.attention`.",
        )
    return difference
