"""A wrong recipe is refused with one message: the setting, what it got, what it needs and the way out."""

import math
import sys

import pytest
import torch
import yaml
from recipes import settings, write_recipe

from fastexperts import cli
from fastexperts.errors import FastexpertsError
from fastexperts.train.models import load_model, load_tokenizer
from fastexperts.train.recipe import (
    RESUME_MAY_CHANGE,
    DataSettings,
    LoraSettings,
    ModelSettings,
    Recipe,
    TrainingSettings,
    differences,
    dump_recipe,
    load_recipe,
    parse_recipe,
)


def run_cli(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of the console script, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastexperts", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output = capsys.readouterr()
    return stopped.value.code or 0, output.out, output.err


def put(dotted, value):
    """An edit of settings: `put("training.steps", 3)`."""

    def edit(content, folder):
        *sections, name = dotted.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value

    return edit


def drop(*dotted):
    """An edit that removes settings."""

    def edit(content, folder):
        for name in dotted:
            *sections, last = name.split(".")
            target = content
            for section in sections:
                target = target[section]
            del target[last]

    return edit


def both(*edits):
    """Several edits."""

    def edit(content, folder):
        for each in edits:
            each(content, folder)

    return edit


def data_file(name, text):
    """An edit that trains on a file of this text."""

    def edit(content, folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        content["data"]["files"] = name

    return edit


def saved_model(content, folder):
    """An edit that trains on a checkpoint."""
    chosen = ModelSettings(**content["model"])
    tokenizer = load_tokenizer(chosen)
    load_model(chosen, tokenizer, torch.float32, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    content["model"] = {"path": "./model"}


CASES = {
    "unknown section": (put("trainin", {}), "`trainin` got an unknown setting", "Did you mean `training`?"),
    "unknown key": (
        put("training.learning_rat", 1),
        "`training.learning_rat`",
        "Did you mean `learning_rate`?",
    ),
    "key of another section": (put("training.packing", True), "`training.packing`", "belongs into `data`"),
    "unknown key, none close": (put("data.zzz", 1), "`data.zzz`", "Known: `files`"),
    "no model": (drop("model"), "`model` got nothing", "Add it"),
    "no output_dir": (drop("output_dir"), "`output_dir` got nothing", "Add it"),
    "empty output_dir": (put("output_dir", " "), "`output_dir` got an empty text", "Name a file or folder"),
    "two models": (put("model.path", "x"), "both `path` and `config`", "exactly one"),
    "no source of a model": (drop("model.config"), "neither `path` nor `config`", "exactly one"),
    "unknown tiny config": (
        put("model.config", "tiny-mixtrall"),
        "'tiny-mixtrall'",
        "Did you mean `tiny-mixtral`?",
    ),
    "overrides of a checkpoint": (
        both(drop("model.config"), put("model.path", "./x")),
        "`overrides` beside `path`",
        "drop it",
    ),
    "unknown override": (
        put("model.overrides", {"num_expert": 4}),
        "model.overrides.num_expert",
        "`num_experts`",
    ),
    "impossible override": (
        put("model.overrides", {"hidden_size": "big"}),
        "model.overrides",
        "settings that make a model of tiny-qwen3-moe",
    ),
    "override that no model can be made of": (
        put("model.overrides", {"hidden_act": "siluu"}),
        "KeyError: 'siluu'",
        "settings that make a model",
    ),
    "more experts per token than experts": (
        put("model.overrides", {"num_experts_per_tok": 17}),
        "selected index k out of range",
        "settings that make a model",
    ),
    "attention not installed, from scratch": (
        put("model.attention", "flash_attention_3"),
        "`model.attention` got 'flash_attention_3', which transformers cannot use",
        "model.attention: sdpa",
    ),
    "attention not installed, of a checkpoint": (
        both(saved_model, put("model.attention", "flash_attention_2")),
        "`model.attention` got 'flash_attention_2', which transformers cannot use",
        "model.attention: sdpa",
    ),
    "vocabulary smaller than the tokenizer's": (
        put("model.overrides", {"vocab_size": 258}),
        "260 tokens",
        "embeddings of 258",
    ),
    "unknown model": (put("model", {"path": "no/such-model"}), "'no/such-model'", "Check the name"),
    "model path that is no folder": (
        put("model", {"path": "./missing"}),
        "which is no folder",
        "Correct the path",
    ),
    "unknown tokenizer": (put("model.tokenizer", "no/such-tokenizer"), "`model.tokenizer`", "Check the name"),
    "text for a number": (put("training.batch_size", "many"), "'many'", "a whole number"),
    "quoted number": (put("training.steps", "10"), "`training.steps` got '10'", "without quotes"),
    "fraction of a step": (put("training.steps", 1.5), "1.5", "a whole number"),
    "text for a bool": (put("data.packing", "maybe"), "'maybe'", "true or false"),
    "unknown checkpointing": (put("training.checkpoint", "selective"), "'selective'", "'keep-experts'"),
    "true as checkpointing": (put("training.checkpoint", True), "`training.checkpoint` got True", "'full'"),
    "checkpointing by its name elsewhere": (
        put("training.gradient_checkpointing", True),
        "`training.gradient_checkpointing` got an unknown setting",
        "`checkpoint`",
    ),
    "unknown part of the step": (
        put("training.optimize", {"norm": False}),
        "`training.optimize.norm`",
        "Did you mean `norms`?",
    ),
    "zero batch": (put("training.batch_size", 0), "greater than or equal to 1", "sequences per device"),
    "negative learning rate": (put("training.learning_rate", -1e-4), "-0.0001", "greater than 0"),
    "nan": (put("training.learning_rate", math.nan), "`training.learning_rate` got nan", "a finite number"),
    "endless warmup": (put("training.warmup", math.inf), "`training.warmup` got inf", "a finite number"),
    "endless epochs": (
        both(drop("training.steps"), put("training.epochs", math.inf)),
        "`training.epochs` got inf",
        "a finite number",
    ),
    "endless auxiliary loss": (
        put("training.router_aux_loss_coef", math.inf),
        "`training.router_aux_loss_coef` got inf",
        "a finite number",
    ),
    "endless alpha": (
        both(put("training.method", "lora"), put("lora.alpha", math.inf)),
        "`lora.alpha` got inf",
        "a finite number",
    ),
    "eval fraction": (put("data.eval_fraction", 0.9), "0.9", "less than or equal to 0.5"),
    "eval fraction of one document": (
        both(data_file("one.txt", "hello"), put("data.eval_fraction", 0.1)),
        "leaves one part empty",
        "data.document",
    ),
    "steps and epochs": (put("training.epochs", 1.0), "both `steps` and `epochs`", "Remove one"),
    "lora with full training": (put("lora", {"r": 8}), "`lora` beside `method: full`", "method: lora"),
    "rank out of range": (
        both(put("training.method", "lora"), put("lora.r", 129)),
        "`lora.r` got 129",
        "less than or equal to 128",
    ),
    "nothing to adapt": (
        both(put("training.method", "lora"), put("lora", {"experts": False, "attention": False})),
        "`lora` got nothing to adapt",
        "experts: true",
    ),
    "shared experts that are not there": (
        both(put("training.method", "lora"), put("lora.shared_experts", True)),
        "`shared_experts` got True",
        "shared_experts=False",
    ),
    "rank in the wrong section": (put("training.alpha", 8), "`training.alpha`", "belongs into `lora`"),
    "unknown scheduler": (put("training.scheduler", "cosin"), "'cosin'", "Did you mean `cosine`?"),
    "unknown tracker": (put("training.report_to", ["wandbb"]), "'wandbb'", "`wandb`"),
    "tracker not installed": (put("training.report_to", "trackio"), "not installed", "pip install trackio"),
    "optimizer not installed": (
        put("training.optimizer", "lion_8bit"),
        "bitsandbytes is not installed",
        "pip install bitsandbytes",
    ),
    "section is a text": (put("training", "fast"), "`training` got 'fast'", "name: value"),
    "missing file": (put("data.files", "gone.jsonl"), "gone.jsonl, no such file", "recipe's folder"),
    "folder as file": (put("data.files", "."), "a folder", "Name the files in it"),
    "no files": (put("data.files", []), "an empty list", "at least one file"),
    "two sources of data": (put("data.dataset", "x"), "both `files` and `dataset`", "exactly one"),
    "unknown kind of file": (data_file("data.csv", "a,b"), "data.csv", ".parquet"),
    "empty text": (data_file("empty.txt", " \n"), "no documents", "Give it text"),
    "empty JSONL": (data_file("empty.jsonl", ""), "no documents", "Give it text"),
    "blank documents": (data_file("blank.jsonl", '{"text": " "}\n'), "no documents", "Give it text"),
    "broken JSONL": (
        data_file("bad.jsonl", '{"text": "a"}\n{"text": '),
        "cannot be read",
        "one JSON object a line",
    ),
    "broken parquet": (data_file("bad.parquet", b"PAR1"), "cannot be read", "a Parquet table"),
    "no UTF-8": (data_file("latin.txt", b"caf\xe9"), "latin.txt", "Convert the file to UTF-8"),
    "no such column": (
        put("data.text_column", "body"),
        "'body', and the data has ['text']",
        "data.text_column",
    ),
    "column of numbers": (data_file("n.jsonl", '{"text": 3}\n'), "column of int64", "a column of text"),
    "null document": (data_file("n.jsonl", '{"text": "a"}\n{"text": null}\n'), "1 empty rows", "Remove them"),
    "null settings of the template": (
        data_file(
            "m.jsonl",
            '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"b": 1}}\n'
            '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": null}\n',
        ),
        "`data column chat_template_kwargs` got 1 empty rows",
        "Remove them",
    ),
    "assistant-only loss of plain text": (
        put("data.assistant_only_loss", True),
        "`data.assistant_only_loss`",
        "chat",
    ),
    "messages that are texts": (
        data_file("m.jsonl", '{"messages": ["hi"]}\n'),
        "in row 0",
        "`role` and `content`",
    ),
    "message without content": (
        data_file("m.jsonl", '{"messages": [{"role": "user", "content": null}]}\n'),
        "in row 0",
        "`role` and `content`",
    ),
    "call of a tool, for a template without": (
        data_file(
            "m.jsonl",
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]}\n',
        ),
        "content has to be a text",
        "model.tokenizer",
    ),
    "parts of content, for a template without": (
        data_file(
            "m.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n'
        ),
        "content has to be a text",
        "model.tokenizer",
    ),
    "unknown dataset": (
        both(drop("data.files"), put("data.dataset", "no/such-dataset")),
        "'no/such-dataset', split 'train'",
        "data.files",
    ),
    "output folder in use": (
        lambda content, folder: (folder / "run").mkdir() or (folder / "run" / "notes.txt").write_text("mine"),
        "run, which is not empty",
        "--resume",
    ),
    "output folder that cannot be made": (
        put("output_dir", "/proc/x"),
        "`output_dir` got /proc/x",
        "Choose another one",
    ),
    "output folder is a file": (
        lambda content, folder: (folder / "run").write_text("mine"),
        "run, a file",
        "Choose another name",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_recipes_exit_2_with_one_message(tmp_path, monkeypatch, capsys, case):
    edit, *parts = CASES[case]
    content = settings(tmp_path) | {"output_dir": "run"}
    edit(content, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, message = run_cli(monkeypatch, capsys, "train", write_recipe(tmp_path, content))
    assert code == 2, message
    for part in (*parts, "it needs"):
        assert part in message
    assert "Traceback" not in message
    assert message.startswith("Error: ")
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "recipe.yaml") == before, (
        "nothing was written"
    )


YAML_CASES = {
    "duplicate key": ("training:\n  steps: 1\n  steps: 2\n", "`steps` is in line 2 and line 3"),
    "python object": ("output_dir: !!python/object/apply:os.getcwd []\n", "not plain YAML"),
    "broken YAML": ("model: [\n", "not plain YAML"),
    "a list": ("- model\n", "got a list"),
    "empty": ("", "got nothing"),
    "binary": (b"\xff\xfe\x00", "not plain YAML"),
}


@pytest.mark.parametrize("case", YAML_CASES)
def test_wrong_yaml_exits_2_with_one_message(tmp_path, monkeypatch, capsys, case):
    text, part = YAML_CASES[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, message = run_cli(monkeypatch, capsys, "train", path)
    assert code == 2
    assert part in message
    assert "Traceback" not in message


def test_a_recipe_that_is_not_there(tmp_path, monkeypatch, capsys):
    code, _, message = run_cli(monkeypatch, capsys, "train", tmp_path / "none.yaml")
    assert (code, "no such file" in message) == (2, True)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    content = settings(tmp_path, steps=0, batch_size="x", learning_rate=-1)
    content["data"]["filess"] = 1
    with pytest.raises(FastexpertsError) as error:
        parse_recipe(content)
    for name in ("training.steps", "training.batch_size", "training.learning_rate", "data.filess"):
        assert f"`{name}`" in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("5E-5", 5e-5),
        ("1e-04", 1e-4),
        (".5e-3", 5e-4),
        ("0.01", 0.01),
        ("1", 1.0),
    ],
)
def test_numbers_as_people_write_them(tmp_path, text, value):
    path = write_recipe(tmp_path, settings(tmp_path))
    path.write_text(path.read_text().replace("learning_rate: 0.003", f"learning_rate: {text}"))
    assert load_recipe(path).training.learning_rate == value


def test_checkpointing_off_is_not_false(tmp_path):
    content = settings(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content).replace("training:\n", "training:\n  checkpoint: off\n"))
    recipe = load_recipe(path)
    assert recipe.training.checkpoint == "off"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_what_is_no_number_stays_text(tmp_path):
    path = write_recipe(tmp_path, settings(tmp_path) | {"output_dir": "PLACE"})
    for name in ("1e-4-run", "e4", "run1e4"):
        (tmp_path / "r.yaml").write_text(path.read_text().replace("PLACE", name))
        assert load_recipe(tmp_path / "r.yaml").output_dir == str(tmp_path / name)


def test_relative_paths_start_at_the_recipe(tmp_path, monkeypatch):
    content = settings(tmp_path) | {"output_dir": "out"}
    content["data"]["files"] = ["texts.jsonl", "../x.jsonl"]
    content["model"] = {"path": "./ours", "tokenizer": "org/theirs"}
    path = write_recipe(tmp_path, content)
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert recipe.data.files == [str(tmp_path / "texts.jsonl"), str(tmp_path.parent / "x.jsonl")]
    assert recipe.output_dir == str(tmp_path / "out")
    assert (recipe.model.path, recipe.model.tokenizer) == (str(tmp_path / "ours"), "org/theirs")


def test_changes_replace_settings(tmp_path):
    path = write_recipe(tmp_path, settings(tmp_path))
    recipe = load_recipe(path, **{"training.steps": 3, "output_dir": "/elsewhere"})
    assert (recipe.training.steps, recipe.output_dir) == (3, "/elsewhere")


@pytest.mark.parametrize("section", [None, "lora", ["steps"]])
def test_changes_of_what_is_no_section_are_refused(tmp_path, section):
    path = write_recipe(tmp_path, settings(tmp_path) | {"training": section})
    with pytest.raises(FastexpertsError, match=r"`training` got .*needs settings, one `name: value` a line"):
        load_recipe(path, **{"training.steps": 10})


@pytest.mark.parametrize("lora", [None, {}, {"r": 8, "alpha": 4.0}])
def test_dump_is_read_back(tmp_path, lora):
    content = settings(tmp_path)
    if lora is not None:
        content["training"]["method"] = "lora"
        content["lora"] = lora
    recipe = load_recipe(write_recipe(tmp_path, content))
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_differences_name_the_settings(tmp_path):
    old, new = parse_recipe(settings(tmp_path)), parse_recipe(settings(tmp_path, seed=1, save_steps=7))
    assert differences(old, new) == {"training.seed": (42, 1)}
    ranks = [parse_recipe(settings(tmp_path, method="lora") | {"lora": {"r": r}}) for r in (8, 16)]
    assert differences(*ranks) == {"lora.r": (8, 16)}
    plain = parse_recipe(settings(tmp_path, method="lora"))
    assert differences(ranks[1], plain) == {}, "16 is the default"
    wider = settings(tmp_path)
    wider["model"]["overrides"]["hidden_size"] = 64
    assert list(differences(old, parse_recipe(wider))) == ["model.overrides"]
    sections = {"model": ModelSettings, "data": DataSettings, "training": TrainingSettings}
    sections["lora"] = LoraSettings
    known = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert known | {"output_dir"} >= RESUME_MAY_CHANGE


def test_the_example_explains_every_setting(request):
    path = request.config.rootpath / "examples" / "recipe.yaml"
    recipe, lora = load_recipe(path), load_recipe(path.with_name("recipe-lora.yaml"))
    assert lora.lora == LoraSettings(), "the defaults, as it says"
    assert [str(request.config.rootpath / "README.md")] == recipe.data.files
    text = path.read_text(encoding="utf-8")
    for name, field in Recipe.model_fields.items():
        if name == "lora":
            continue
        for key in getattr(field.annotation, "model_fields", {name: None}):
            assert f"{key}:" in text, f"{name}.{key} is not in the example"
    content = yaml.safe_load(path.with_name("recipe-lora.yaml").read_text(encoding="utf-8"))
    assert content["lora"].keys() == LoraSettings.model_fields.keys()
    assert yaml.safe_load(text)["output_dir"] == "../runs/example"
