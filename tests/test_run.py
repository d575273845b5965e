"""`fastexperts run` inside a process: what it switches, what it leaves, and the conflicts that it names."""

import copy
import os
from types import MethodType

import pytest
import support_outside
from support_hf import tiny_config, tiny_model, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import modeling_utils as loading
from transformers import trainer_callback as training
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeForCausalLM

from fastexperts.run.report import Finding, read
from fastexperts.run.switch import Switch

SWITCHED = Finding("switched", "Qwen3MoeForCausalLM", "Qwen3MoeExperts", 2, "swiglu")


@pytest.fixture
def findings(tmp_path, monkeypatch):
    """Turns this process into one of a command's; gives a function that reads what was found so far."""
    for cls, names in (
        (loading.PreTrainedModel, ("from_pretrained", "_from_config")),
        (training.CallbackHandler, ("on_train_begin", "on_train_end")),
    ):
        for name in names:
            monkeypatch.setattr(cls, name, vars(cls)[name])
    folder = tmp_path / "findings"
    folder.mkdir()
    switch = Switch(str(folder))
    switch.patch(loading)
    switch.patch(training)
    return lambda *states: [f for f in read(folder)[str(os.getpid())] if not states or f.state in states]


@pytest.fixture
def saved(tmp_path):
    """Folder of a tiny qwen3_moe that transformers has saved."""
    tiny_model("qwen3_moe", "eager").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def implementations(model):
    return {layer.mlp.experts.config._experts_implementation for layer in model.model.layers}


def train(folder, model, *callbacks):
    """The Trainer of a run of one step, when it is over."""
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    chosen = {"max_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder / "out"), save_strategy="no", **chosen)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_a_checkpoint_that_is_loaded_is_switched(saved, findings, capsys):
    model, _ = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert findings() == [SWITCHED]
    assert implementations(model) == {"fastexperts"}
    assert str(SWITCHED) in capsys.readouterr().err, "at once, not at the end of a run of days alone"


def test_a_model_that_is_built_is_switched(findings):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    assert findings() == [SWITCHED]
    again = AutoModelForCausalLM.from_config(model.config)
    assert implementations(again) == {"fastexperts"}, "what another model was switched to is no choice"


def test_one_process_of_a_machine_speaks(saved, findings, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    AutoModelForCausalLM.from_pretrained(saved)
    assert findings() == [SWITCHED]
    assert "fastexperts" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["argument", "config", "subconfig"])
def test_what_the_command_chooses_is_kept(saved, findings, how):
    if how == "argument":
        model = AutoModelForCausalLM.from_pretrained(saved, experts_implementation="eager")
    elif how == "config":
        config = tiny_config("qwen3_moe", experts_implementation="grouped_mm")
        model = AutoModelForCausalLM.from_pretrained(saved, config=config)
    else:
        model = AutoModelForCausalLM.from_pretrained(saved, experts_implementation={"": "eager"})
    assert [(f.state, f.layers) for f in findings()] == [("kept", 2)]
    assert implementations(model) == {"grouped_mm" if how == "config" else "eager"}


def test_a_default_of_the_trainer_s_own_is_a_choice(saved, findings, monkeypatch):
    """What Unsloth does: its function is registered, and is what no choice comes to."""
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "theirs", batched_mm_experts_forward)
    original = PreTrainedModel.get_correct_experts_implementation
    monkeypatch.setattr(
        PreTrainedModel,
        "get_correct_experts_implementation",
        lambda self, requested: original(self, requested or "theirs"),
    )
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert findings() == [Finding("kept", "Qwen3MoeForCausalLM", "Qwen3MoeExperts", 2, "'theirs'")]
    assert implementations(model) == {"theirs"}


def test_fastexperts_may_be_chosen(saved, findings):
    AutoModelForCausalLM.from_pretrained(saved, experts_implementation="fastexperts")
    assert findings() == [SWITCHED]


def test_a_dense_model_passes_untouched(tmp_path, findings):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=97, **sizes))
    trainer = train(tmp_path, model)
    assert findings() == []
    assert not any(key.startswith("perf/") for entry in trainer.state.log_history for key in entry)


def test_a_class_patched_before_is_refused_with_its_name(saved, findings, monkeypatch):
    monkeypatch.setattr(Qwen3MoeExperts, "forward", batched_mm_experts_forward)
    model = AutoModelForCausalLM.from_pretrained(saved)
    (refused,) = findings()
    assert (refused.state, refused.layers) == ("refused", 2)
    assert "batched_mm_experts_forward, which does not ask transformers" in refused.detail
    assert implementations(model) == {"grouped_mm"}


def test_parts_of_a_model_are_not_switched_before_it_is_whole(findings):
    class Outer(PreTrainedModel):
        config_class = type(tiny_config("qwen3_moe"))

        def __init__(self, config):
            super().__init__(config)
            self.language_model = AutoModelForCausalLM.from_config(config)
            assert findings() == []
            self.post_init()

        def forward(self, **inputs):
            return self.language_model(**inputs)

    model = Outer._from_config(tiny_config("qwen3_moe"))
    assert [(f.state, f.model, f.layers) for f in findings()] == [("switched", "Outer", 2)]
    assert implementations(model.language_model) == {"fastexperts"}


def test_an_old_library_is_said_and_changes_nothing(saved, findings, monkeypatch):
    from fastexperts.hf import experts

    monkeypatch.setitem(experts.OLDEST, "transformers", "99.0")
    model = AutoModelForCausalLM.from_pretrained(saved)
    (old,) = findings()
    assert old.state == "old"
    assert "transformers >= 99.0" in old.detail
    assert implementations(model) == {"grouped_mm"}


class Tracker(TrainerCallback):
    """A tracker, such as TensorBoard: it takes what is in the logs when it is called."""

    def on_log(self, args, state, control, logs, **_):
        self.logs = getattr(self, "logs", dict(logs))


def test_a_trainer_logs_performance_before_its_trackers(tmp_path, saved, findings):
    tracker = Tracker()
    trainer = train(tmp_path, AutoModelForCausalLM.from_pretrained(saved), tracker)
    assert tracker.logs["perf/tokens_per_s"] == trainer.state.log_history[0]["perf/tokens_per_s"] > 0
    switched, trained, measured = findings()
    assert switched == SWITCHED
    assert trained == Finding("trained", "Qwen3MoeForCausalLM", layers=2)
    assert measured.detail == f"perf/tokens_per_s {tracker.logs['perf/tokens_per_s']:.4g}"
    trainer.train()
    assert len([c for c in trainer.callback_handler.callbacks if "Performance" in type(c).__name__]) == 1


def test_what_no_load_has_shown_is_switched_when_training_begins(tmp_path, findings):
    model = Qwen3MoeForCausalLM(tiny_config("qwen3_moe"))
    assert findings() == []
    train(tmp_path, model)
    assert findings("switched", "trained") == [SWITCHED, Finding("trained", "Qwen3MoeForCausalLM", layers=2)]
    assert implementations(model) == {"fastexperts"}


def test_a_copy_of_a_switched_model_counts_as_switched(tmp_path, saved, findings):
    train(tmp_path, copy.deepcopy(AutoModelForCausalLM.from_pretrained(saved)))
    assert findings("switched", "trained")[-2:] == [
        SWITCHED,
        Finding("trained", "Qwen3MoeForCausalLM", layers=2),
    ]


def test_adapters_are_no_conflict(tmp_path, saved, findings):
    from peft import LoraConfig, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved), LoraConfig(r=2, target_parameters=targets)
    )
    train(tmp_path, model)
    assert [f.state for f in findings()] == ["switched", "trained", "measured"]
    assert findings("trained") == [Finding("trained", "Qwen3MoeForCausalLM", layers=2)]


def one_forward_replaced(model):
    experts = model.model.layers[1].mlp.experts
    experts.forward = lambda *args: batched_mm_experts_forward(experts, *args)


def implementation_replaced(model):
    model.set_experts_implementation("eager")


class Patcher(TrainerCallback):
    def __init__(self, patch):
        self.patch = patch

    def on_step_end(self, args, state, control, model=None, **_):
        self.patch(model)


@pytest.mark.parametrize(
    ("patch", "layers", "reason"),
    [
        (one_forward_replaced, 1, "one_forward_replaced.<locals>.<lambda>, which does not ask transformers"),
        (implementation_replaced, 2, "set to 'eager'"),
    ],
)
@pytest.mark.parametrize("when", ["before training", "while training"])
def test_experts_patched_after_they_were_switched_are_a_conflict(
    tmp_path, saved, findings, patch, layers, reason, when
):
    model = AutoModelForCausalLM.from_pretrained(saved)
    if when == "before training":
        patch(model)
        train(tmp_path, model)
        assert findings("trained") == [Finding("trained", "Qwen3MoeForCausalLM", layers=2 - layers)]
    else:
        train(tmp_path, model, Patcher(patch))
    (conflict,) = findings("conflict")
    assert (conflict.model, conflict.layers) == ("Qwen3MoeForCausalLM", layers)
    assert reason in conflict.detail


def test_experts_outside_the_interface(tmp_path, findings):
    model = support_outside.build("llama4")
    (switched,) = findings()
    assert (switched.state, switched.experts) == ("switched", "Llama4TextMoe")
    block = next(m for m in model.modules() if type(m).__name__ == "Llama4TextMoe")
    block.forward = MethodType(type(block).forward, block)
    train(tmp_path, model)
    (conflict,) = findings("conflict")
    assert (conflict.experts, conflict.layers) == ("Llama4TextMoe", 1)
    assert "another forward stands in the place of ours" in conflict.detail


def test_a_model_of_no_transformers_class_trains(tmp_path, findings):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Embedding(97, 97)

        def forward(self, input_ids, labels):
            logits = self.head(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    train(tmp_path, Plain())
    assert findings() == []
