"""What a model learns from: packed documents that do not see each other, the assistant's words alone."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from recipes import SMALL, settings
from rich.console import Console

from fastexperts.errors import FastexpertsError
from fastexperts.train.data import check_isolation, load_documents
from fastexperts.train.models import load_model, load_tokenizer
from fastexperts.train.recipe import DataSettings, ModelSettings, parse_recipe
from fastexperts.train.sft import make_trainer, sft_config
from fastexperts.train.tokenizer import byte_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who routes?"},
    {"role": "assistant", "content": "The gate."},
    {"role": "user", "content": "Sure? \u00e9"},
    {"role": "assistant", "content": "Yes \u2713"},
]


def trainer_for(folder, config="tiny-qwen3-moe", attention="sdpa", tokenizer=None, **data):
    content = settings(folder, config, checkpoint="off")
    content["model"] |= {"attention": attention, "tokenizer": tokenizer and str(tokenizer)}
    content["data"] |= data
    recipe = parse_recipe(content)
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model, tokenizer, torch.float32, recipe.training.seed)
    documents = load_documents(recipe.data, recipe.training.seed)
    return make_trainer(sft_config(recipe), model, tokenizer, documents, Console(quiet=True))


def documents_of(batch):
    """(start, end) of each document in a padding-free batch."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return list(zip(starts, [*starts[1:], batch["position_ids"].shape[1]], strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", sorted(SMALL))
def test_a_packed_document_is_computed_as_if_alone(tmp_path, config, attention):
    trainer = trainer_for(tmp_path, config, attention)
    batch = next(iter(trainer.get_train_dataloader()))
    spans = documents_of(batch)
    assert len(spans) >= 4, "or nothing is packed, and this shows nothing"
    assert "attention_mask" not in batch
    model = trainer.model.eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        for start, end in spans:
            alone = model(batch["input_ids"][:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)
            assert labels[0, start] == -100, "no document's start is predicted from another's end"
            assert torch.equal(labels[0, start + 1 : end], batch["input_ids"][0, start + 1 : end])


def test_the_neighbour_would_show_without_isolation(tmp_path):
    trainer = trainer_for(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    _, (start, end), *_ = documents_of(batch)
    with torch.no_grad():
        joined = trainer.model(batch["input_ids"], use_cache=False).logits[0, start:end]
        alone = trainer.model(batch["input_ids"][:, start:end], use_cache=False).logits[0]
    assert float((joined - alone).norm() / alone.norm()) > 0.1


def test_packing_loses_no_token(tmp_path):
    texts = ["short", "x" * 500, "a middling document of some length", "y" * 64]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    trainer = trainer_for(tmp_path, files=str(path))
    tokens = [token for row in trainer.train_dataset["input_ids"] for token in row]
    assert len(tokens) == sum(len(text) + 1 for text in texts), "each with its end-of-text"
    assert tokens.count(ord("x")) == sum(text.count("x") for text in texts)
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 64


@pytest.mark.parametrize("config", sorted(SMALL))
def test_check_isolation_knows_a_leak(config):
    chosen = ModelSettings(config=config, overrides=SMALL[config])
    model = load_model(chosen, load_tokenizer(chosen), torch.float32, 0)
    assert check_isolation(model, 260, model) < 1e-5
    assert model.training

    def leaky(position_ids, **batch):
        return model(**batch)

    with pytest.raises(FastexpertsError, match=r"see each other when packed .*packing: false"):
        check_isolation(model, 260, leaky)


@pytest.mark.parametrize("packing", [True, False])
def test_assistant_only_loss_learns_what_the_assistant_says(tmp_path, packing):
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 4)
    trainer = trainer_for(
        tmp_path, files=str(path), assistant_only_loss=True, packing=packing, max_length=256
    )
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class
    learned = [
        tokenizer.decode(row_ids[row_labels != -100])
        for row_ids, row_labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    said = "The gate.<|im_end|>Yes \u2713<|im_end|>"
    assert "".join(learned) == said * 4
    assert "Who routes?" in tokenizer.decode(batch["input_ids"][0])


def test_without_it_every_token_of_a_chat_is_learned(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 4)
    trainer = trainer_for(tmp_path, files=str(path), packing=False, max_length=256)
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.equal(batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("encoded", [False, True])
def test_tools_and_settings_of_the_template_are_in_the_text(tmp_path, encoded):
    tools = [{"type": "function", "function": {"name": "route", "parameters": {}}}]
    rows = {
        "messages": CHAT,
        "tools": json.dumps(tools) if encoded else tools,
        "chat_template_kwargs": {"mood": "calm"},
        "other": "not read",
    }
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps(rows) + "\n") * 4)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{%- for tool in tools %}{{- tool.function.name }}{%- endfor %}{{- mood }}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    trainer = trainer_for(tmp_path, tokenizer=tmp_path / "tokenizer", files=str(path), max_length=256)
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith("routecalm<|im_start|>system")
    assert "other" not in load_documents(DataSettings(files=str(path)), 0).train.column_names


def test_a_byte_is_a_token_and_text_round_trips():
    tokenizer = byte_tokenizer()
    text = "tab\t caf\u00e9 \u2713 \U0001f600\r\n  two  spaces "
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 260
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def texts_of(**data):
    return load_documents(DataSettings(**data), seed=0).train["text"][:]


def test_text_files_split_as_asked(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert texts_of(files=str(path)) == ["one\ntwo\n\n\nthree\n"]
    assert texts_of(files=str(path), document="paragraph") == ["one\ntwo", "three\n"]
    assert texts_of(files=[str(path), str(path)], document="line") == ["one", "two", "three"] * 2


def test_tables_give_their_column(tmp_path):
    pq.write_table(pa.table({"body": ["a", "b"], "other": [1, 2]}), tmp_path / "t.parquet")
    assert texts_of(files=str(tmp_path / "t.parquet"), text_column="body") == ["a", "b"]
    (tmp_path / "t.jsonl").write_text('{"body": "c", "text": "no"}\n{"body": "d", "text": "no"}\n')
    assert texts_of(files=str(tmp_path / "t.jsonl"), text_column="body") == ["c", "d"]
    (tmp_path / "t.parquet").unlink()
    assert texts_of(dataset=str(tmp_path), split="train", text_column="body") == ["c", "d"]


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    (tmp_path / "my[1].jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "my1.jsonl").write_text('{"text": "b"}\n')
    assert texts_of(files=str(tmp_path / "my[1].jsonl")) == ["a"]


def test_evaluation_is_a_seeded_share_of_the_documents(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"document {i}" for i in range(40)))
    chosen = DataSettings(files=str(path), document="line", eval_fraction=0.25)
    first, again, other = (load_documents(chosen, seed) for seed in (1, 1, 2))
    train, evaluation = first.train["text"][:], first.evaluation["text"][:]
    assert len(evaluation) == 10
    assert sorted(train + evaluation) == sorted(path.read_text().splitlines())
    assert again.evaluation["text"][:] == evaluation != other.evaluation["text"][:]
