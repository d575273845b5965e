"""benchmarks/model.py: cuts, where a step's time is put, rows, tables; all from end to end on the CPU."""

import json
import math
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support import ROOT
from test_benchmarks import ENVIRONMENT, FakeEvent

sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("transformers")

import attention
import budget
import curves
import cuts
import model
import model_report
import report
import results
import step
from breakdown import (
    BACKWARD,
    FORWARD,
    PARTS,
    RECOMPUTE,
    Span,
    attribute,
    part_ranges,
    parts_of,
    places,
    spans_of,
)

import fastexperts
from fastexperts.hf import attention as attention_part
from fastexperts.metrics.flops import count_flops
from fastexperts.metrics.gathered import Gathered

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
QWEN = cuts.CUTS["qwen3-30b-a3b"]
GB = 10**9
NODE = "autograd::engine::evaluate_function: "


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cut", cuts.CUTS.values(), ids=cuts.CUTS)
def test_cuts_have_the_published_experts_and_fit_a_card(cut):
    meta = cuts.meta_model(cut)
    shape, config = cut.shape, meta.config
    stored = {tuple(p.shape) for name, p in meta.named_parameters() if "experts." in name and p.dim() == 3}
    assert stored == {
        (shape.experts, 2 * shape.dim_f, shape.dim_d),
        (shape.experts, shape.dim_d, shape.dim_f),
    }
    assert config.num_experts_per_tok == shape.top_k
    assert config.num_hidden_layers == cut.layers < cut.full_layers
    weights = 2 * sum(p.numel() for p in meta.parameters())
    # At its ends a step holds the logits, once in bf16 and three times in fp32; between, one layer's rows
    # under the default, which copies them about 8 times (measured at qwen3-30b: 4.5 GB where this says 5.9).
    logits = cut.tokens * config.vocab_size * (2 + 3 * 4)
    layer = 8 * 2 * cut.tokens * shape.top_k * (shape.dim_d + shape.dim_f)
    inputs = 2 * cut.layers * cut.tokens * shape.dim_d
    assert max(weights + logits, 2 * weights + layer) + inputs < 76 * GB
    assert 8 * GB < weights < 20 * GB


@pytest.mark.parametrize("cut", cuts.CUTS.values(), ids=cuts.CUTS)
def test_tiny_cuts_learn_in_every_part(cut):
    tiny = cut.tiny()
    built = tiny.build("cpu", "fp32")
    assert built.config._experts_implementation == "grouped_mm"
    assert built.config._attn_implementation == "sdpa"
    routers = [p for name, p in built.named_parameters() if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(p.std() > 0.01 for p in routers)
    ids = tiny.batch_ids("cpu")
    loss = built(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    assert all(
        p.grad is not None and p.grad.any() for p in built.parameters() if p.requires_grad and p.dim() > 1
    )
    again = tiny.build("cpu", "fp32")
    assert all(torch.equal(*pair) for pair in zip(built.parameters(), again.parameters(), strict=True))


def test_a_router_that_transformers_leaves_at_zero_is_drawn(monkeypatch):
    import transformers

    made = QWEN.tiny().build("cpu", "fp32")
    made.model.layers[0].mlp.gate.weight.data.zero_()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", lambda *_, **__: made)
    QWEN.tiny().build("cpu", "fp32")
    assert made.model.layers[0].mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("convention", "share"), [("causal", 0.1975), ("full", 0.2239)])
def test_mfu_of_the_step_that_the_project_began_with(convention, share):
    flops = count_flops(QWEN.config()).per_token(QWEN.length)
    found = step.Training.mfu(SimpleNamespace(flops=flops), QWEN.tokens, 379.0, 989e12, convention)
    assert found == pytest.approx(share, abs=5e-5)
    assert step.Training.mfu(SimpleNamespace(flops=flops), QWEN.tokens, 379.0, None, convention) is None


def spans(*rows):
    """(name, thread, parent, own us, sequence, forward thread)"""
    return [Span(*row) for row in rows]


def test_backward_and_recomputation_on_another_thread():
    """As on a card: autograd's thread counts its own operations from 0."""
    found = spans(
        ("part: loss and LM head", 1, None, 1),
        ("part: norms", 1, 0, 0),
        ("aten::detach", 1, 0, 2, 5),  # makes no node: 5 is the next operation's
        ("aten::rsqrt", 1, 1, 4, 5),
        ("part: router", 1, 0, 0),
        ("aten::topk", 1, 4, 8, 6),
        ("aten::add", 1, None, 16, 7),
        (NODE + "TopkBackward0", 2, None, 32, 6, 1),
        ("TopkBackward0", 2, 7, 64, 6, 1),
        ("part: norms", 2, 8, 128),  # unpacks what was not kept
        ("aten::topk", 2, 9, 256, 5),  # this thread's 5
        ("aten::gather", 2, 8, 512),
        (NODE + "RsqrtBackward0", 2, None, 1024, 5, 1),
        (NODE + "AddBackward0", 2, None, 2048, 7, 1),
        (NODE + "torch::autograd::AccumulateGrad", 2, None, 4096),
        ("part: optimizer", 1, None, 8192),
    )
    assert attribute(found) == {
        "norms": {FORWARD: 0.004, RECOMPUTE: 0.384, BACKWARD: 1.024},
        "router": {FORWARD: 0.008, BACKWARD: pytest.approx(0.608)},
        "loss and LM head": {FORWARD: 0.003},
        "optimizer": {FORWARD: 8.192},
        "rest": {FORWARD: 0.016, BACKWARD: pytest.approx(6.144)},
    }


def test_rotations_that_are_called_by_no_name():
    found = spans(
        ("part: attention", 1, None, 1),
        ("LigerRopeFunction", 1, 0, 2, 3),
        (NODE + "LigerRopeFunctionBackward", 1, None, 4, 3, 1),
        ("LigerRopeFunctionBackward", 1, 2, 8, 3, 1),
        ("aten::mul", 1, 3, 16),
    )
    assert attribute(found) == {"attention": {FORWARD: 0.001}, "rotary": {FORWARD: 0.002, BACKWARD: 0.028}}


def event(name, device=CPU, us=0.0, kernels=(), scope=0, **values):
    values = {"thread": 1, "fwd_thread": 0, "sequence_nr": -1, "cpu_parent": None, "is_async": False} | values
    kernels = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    time_range = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(
        name=name, device_type=device, time_range=time_range, kernels=kernels, scope=scope, **values
    )


def test_kernels_are_counted_once():
    """The profiler mirrors ranges on the card, and takes a call of CUDA for the operation with its number."""
    outer = event("part: experts", scope=7, kernels=[("part: experts", 90.0)])
    op = event("aten::mm", kernels=[("gemm", 30.0), ("split", 5.0)], cpu_parent=outer, sequence_nr=4)
    call = event("cudaDeviceSynchronize", kernels=[("gemm", 30.0)])
    later = event("ProfilerStep", kernels=[("gemm", 30.0)], is_async=True)
    card = [
        event("part: experts", CUDA, 90.0),
        event("gemm", CUDA, 30.0),
        event("split", CUDA, 5.0),
        event("Memset (Device)", CUDA, 7.0),
    ]
    found, unlinked = spans_of([outer, op, call, later, *card], on_card=True)
    assert found == spans(("part: experts", 1, None, 0), ("aten::mm", 1, 0, 35.0, 4))
    assert unlinked == 7.0
    assert attribute(found) == {"experts": {FORWARD: 0.035}}


def profiled(training):
    """(spans of a step on the CPU, us of everything at the top)."""
    training.step()
    with (
        part_ranges(training.model),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p,
    ):
        training.step()
    events = p.events()
    tops = sum(e.time_range.elapsed_us() for e in events if e.cpu_parent is None and not e.is_async)
    return spans_of(events, on_card=False)[0], tops


def found_at(spans, *names):
    """The places of operations, with how many of `names` are there."""
    found = {}
    for span, place in zip(spans, places(spans), strict=True):
        if span.name in names:
            found[place] = found.get(place, 0) + 1
    return found


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_each_operation_of_a_real_step_is_where_it_belongs(mode):
    training = step.Training(QWEN.tiny(), results.Case(mode=mode), "cpu")
    found, tops = profiled(training)
    assert found_at(found, "aten::_grouped_mm") == {
        ("experts", FORWARD): 4,
        ("experts", RECOMPUTE): 4,
        ("experts", BACKWARD): 8,  # PEFT's fold needs the whole dW as well
    }
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert found_at(found, attention, attention + "_backward") == {
        ("attention", phase): 2 for phase in (FORWARD, RECOMPUTE, BACKWARD)
    }
    assert found_at(found, "aten::topk") == {("router", FORWARD): 2, ("router", RECOMPUTE): 2}
    # 2 layers of 4 norms, and the last, which is not recomputed.
    assert found_at(found, "aten::rsqrt") == {("norms", FORWARD): 9, ("norms", RECOMPUTE): 8}
    negated = {("rotary", phase): 4 for phase in (FORWARD, RECOMPUTE, BACKWARD)}
    assert found_at(found, "aten::neg") == negated | {("router", BACKWARD): 2}  # of dividing by a sum
    # Positions once; of a layer's two residuals, the second is nothing that a backward reads.
    residuals = {place: n for place, n in found_at(found, "aten::add").items() if place[0] == "rest"}
    assert residuals == {("rest", FORWARD): 5, ("rest", RECOMPUTE): 2}
    assert found_at(found, "aten::cross_entropy_loss") == {("loss and LM head", FORWARD): 1}
    assert found_at(found, "aten::embedding") == {("rest", FORWARD): 1}
    # Every microsecond in one place, and all of them there.
    sums = sum(ms for phases in attribute(found).values() for ms in phases.values())
    assert 1e3 * sums == pytest.approx(tops, rel=1e-6)
    assert not any("forward" in vars(module) for module in training.model.modules())


def test_our_experts_are_one_part_and_what_is_kept_is_not_recomputed():
    training = step.Training(QWEN.tiny(), results.Case(backend="fastexperts", checkpoint="off"), "cpu")
    found, _ = profiled(training)
    assert found_at(found, "fastexperts::moe_mlp") == {("experts", FORWARD): 2}
    ours = {name for name in {span.name for span in found} if name.startswith("fastexperts::")}
    assert {part for part, _ in found_at(found, *ours)} == {"experts"}
    assert {phase for _, phase in found_at(found, *ours)} == {FORWARD, BACKWARD}
    assert RECOMPUTE not in {phase for _, phase in places(found)}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_row_on_a_card(mode):
    values = step.measure(QWEN.tiny(), results.Case(mode=mode), "cuda", 2, 989e12)
    assert values["peak_gib"] > values["kept_gib"] > 0
    assert 0 < values["mfu_causal"] < values["mfu_full"] < 1
    parts = values["parts"]
    for part in ("attention", "projections", "rotary", "norms", "router", "experts"):
        assert parts[part].keys() == {FORWARD, RECOMPUTE, BACKWARD}, part
    assert parts["loss and LM head"].keys() == {FORWARD, BACKWARD}
    together = sum(ms for phases in parts.values() for ms in phases.values())
    assert sum(parts.get("not attributed", {}).values()) < 0.02 * together


def test_the_rotation_is_a_part_where_attention_has_a_forward_of_ours():
    training = step.Training(QWEN.tiny(), results.Case(backend="fastexperts", checkpoint="off"), "cpu")
    for module in attention_part.candidates(training.model).values():
        attention_part.forward_of(module, "cpu").put()
    found, _ = profiled(training)
    assert {place: n for place, n in found_at(found, "aten::neg").items() if place[0] == "rotary"} == {
        ("rotary", phase): 4 for phase in (FORWARD, BACKWARD)
    }
    scopes = [
        module.forward.__wrapped__.__globals__
        for module in attention_part.candidates(training.model).values()
    ]
    assert not any(hasattr(scope["apply_rotary_pos_emb"], "in_range") for scope in scopes), "what is left"


def test_parts_of_mla_and_shared_experts():
    built = cuts.CUTS["deepseek-v3"].tiny().build("cpu", "fp32")
    built = step.with_lora(built)
    parts = {
        name.removeprefix("base_model.model.model."): part
        for name, part in parts_of(dict(built.named_modules())).items()
    }
    assert set(parts.values()) <= set(PARTS)
    expected = {
        "layers.0.mlp": "dense MLPs",
        "layers.1": "rest",
        "layers.1.mlp": "router",
        "layers.1.mlp.experts": "experts",  # the outermost wrapper
        "layers.1.mlp.shared_experts": "dense MLPs",
        "layers.1.self_attn": "attention",
        "layers.1.self_attn.kv_a_layernorm": "norms",
        "layers.1.self_attn.kv_a_proj_with_mqa": "projections",
        "layers.1.self_attn.q_b_proj": "projections",
        "rotary_emb": "rotary",
    }
    assert expected.items() <= parts.items()
    inside = [
        name for name in parts if name.startswith(("layers.1.mlp.experts.", "layers.1.self_attn.q_b_proj."))
    ]
    assert not inside


def test_the_cost_of_counting_leaves_no_hooks():
    training = step.Training(QWEN.tiny(), results.Case(), "cpu")
    counted = []
    with mock.patch.object(Gathered, "add", lambda self, row, *_: counted.append(row)):
        share = step.health_share(training.model, training.step, "cpu", count=1)
    assert share > -1
    per_token = 2 * 2  # ids and logits, of each layer once, in spite of checkpoints
    assert len(counted) == 3 * 2 * per_token, "blocks and steps"
    assert not any(module._forward_pre_hooks for module in training.model.modules())


def test_time_is_spent_while_there_is_some():
    now = iter([0.0, 0.0, 4.0, 4.0, 10.0, 10.0, 10.0])  # the start; then begin and end of each item
    limit = budget.Budget(15.0, clock=lambda: next(now))
    assert list(limit.spend("abcd")) == [("a", True), ("b", True), ("c", False), ("d", False)]


DEFAULT = results.StepRow(
    cut="qwen3-30b-a3b",
    step_ms=380.0,
    fastest_ms=379.0,
    slowest_ms=384.5,
    tokens_per_s=43115.8,
    mfu_causal=0.197,
    mfu_full=0.224,
    peak_gib=44.8,
    kept_gib=12.345,
    loss=12.0,
    imbalance=1.25,
    state="1755 MHz, 60 °C, 650 W",
    parts={"experts": {FORWARD: 8.0, RECOMPUTE: 8.0, BACKWARD: 16.0}, "norms": {BACKWARD: 10.0}},
)
OURS = replace(DEFAULT, backend=model.OPTIMIZED, step_ms=190.0, note="norms on")
DENSE = {"up": 1.0, "down": 0.5, "dh": 0.5, "dw2": 0.5, "dx": 1.0, "dw1": 1.0}


def test_rows_are_compared_with_their_default():
    off = replace(DEFAULT, checkpoint="off", step_ms=300.0)
    adamw = replace(DEFAULT, optimizer=True)
    rows = [off, adamw, DEFAULT, OURS]
    assert results.default_of(OURS, rows) is DEFAULT
    assert results.default_of(replace(OURS, checkpoint="off"), rows) is off
    assert results.default_of(replace(OURS, checkpoint="keep-experts"), rows) is DEFAULT
    assert results.default_of(replace(OURS, mode="lora"), rows) is None
    assert results.default_of(OURS, [replace(DEFAULT, skipped="out of memory")]) is None


def test_experts_of_dense():
    assert DEFAULT.of_dense(DENSE, layers=4) == pytest.approx(4 * 4.5 / 24)
    assert replace(DEFAULT, mode="lora").of_dense(DENSE, layers=4) == pytest.approx(4 * 3.0 / 24)
    assert replace(DEFAULT, parts=None).of_dense(DENSE, layers=4) is None
    assert DEFAULT.experts_tflops(10**12) == pytest.approx(3e12 / 24e-3 / 1e12)
    assert replace(DEFAULT, mode="lora").experts_tflops(10**12) == pytest.approx(2e12 / 24e-3 / 1e12)


def test_a_profile_that_is_none_of_the_timed_steps_is_left_out():
    odd = replace(DEFAULT, parts={"rest": {FORWARD: 10 * DEFAULT.step_ms}})
    found = step.describe(QWEN, 989.4e12) | {"steps": 10, "dense": DENSE, "rows": [asdict(odd), asdict(OURS)]}
    assert [row.parts for row in model_report.step_rows_of(found)] == [None, OURS.parts]
    page = model_report.step_page({"environment": ENVIRONMENT, "model": found})
    assert page.count(model_report.NO_PARTS) == 1


def test_what_is_wrong_with_a_record_is_said_on_its_page():
    found = step.describe(QWEN, 989.4e12) | {"steps": 10, "dense": DENSE, "rows": [asdict(DEFAULT)]}
    said = "Peaks hold models of earlier rows."
    for record, times in ((found, 0), (found | {"caveat": said}, 1)):
        assert model_report.step_page({"environment": ENVIRONMENT, "model": record}).count(said) == times


def test_pages_of_steps():
    left = results.StepRow(backend="fastexperts", mode="lora", skipped="CUDA out of memory")
    kept = replace(OURS, checkpoint="keep-experts", weights="fp32", parts={"experts": {FORWARD: 1.0}})
    watched = replace(OURS, health=0.004)
    rows = [asdict(row) for row in (DEFAULT, watched, left, kept)]
    found = step.describe(QWEN, 989.4e12) | {"steps": 10, "dense": DENSE, "rows": rows}
    assert (found["moe_layers"], found["peak_tflops"]) == (6, 989.4)
    record = {"environment": ENVIRONMENT, "model": found}
    text = report.page({"model-qwen3-30b-a3b": record})
    assert (
        "| full | bf16 | fastexperts + optimize | all | none | 190.0 (379.0-384.5) | 43,116 | 19.7% | 22.4% "
        "| 2.00 x | 44.8 | 12.35 | 1.12 (928 TF/s) | 1.25 | 12.0000 | +0.40% | 1755 MHz, 60 °C, 650 W |"
    ) in text
    assert (
        "| lora | bf16 | fastexperts | all | none | " + "- | " * 11 + "skipped: CUDA out of memory |" in text
    )
    assert "| norms | 10.00 | 10.00 |\n| experts | 24.00 | 24.00 |\n| recomputed | 8.00 | 8.00 |" in text
    assert "| **together** | **42.00** | **42.00** |\n| a step takes | 380.00 | 190.00 |" in text
    assert "| ms | full fp32, fastexperts + optimize, all but experts recomputed |" in text
    pages = report.documents({"model-qwen3-30b-a3b": record})
    text = pages[report.RESULTS / "model-qwen3-30b-a3b.md"]
    assert "| experts | 8.00 | 8.00 | 16.00 | 32.00 | 76.2% |" in text
    assert "```\nnorms on\n```" in text


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["model.py", "--tiny", "--output", str(folder), *arguments])
    model.main()


def test_steps_from_arguments_to_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "WARMUP", 1)
    chosen = "--weights bf16 --modes full --backends fastexperts --no-extras"
    run(monkeypatch, tmp_path, "--steps", "1", *chosen.split())
    found = json.loads((tmp_path / "model-qwen3-30b-a3b.json").read_text())
    (row,) = model_report.step_rows_of(found["model"])
    # whose value test_our_step_is_the_default_s tells
    first = step.Training(QWEN.tiny(), results.Case(backend="fastexperts"), "cpu").step()
    assert row.loss == pytest.approx(first.item(), abs=1e-6)
    assert row.imbalance > 1
    assert row.parts["experts"].keys() == {FORWARD, RECOMPUTE, BACKWARD}
    assert f"| full | bf16 | fastexperts | all | none | {row.step_ms:.1f}" in capsys.readouterr().out
    assert "## A training step: qwen3-30b-a3b" in report.page({"model-qwen3-30b-a3b": found})


def test_a_checkout_without_optimize_says_so():
    without = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "fastexperts", without)
        values = step.values_of(lambda: {"note": step.use_optimize(None, results.Case(), 64)})
    assert values == {"skipped": "this checkout has no fastexperts.optimize"}


def test_a_case_that_breaks_is_a_row_and_the_run_goes_on(monkeypatch, capsys):
    def training(cut, case, device):
        if case.mode == "lora":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        raise TypeError("no such\nargument")

    monkeypatch.setattr(step, "Training", training)
    cases = [results.Case(), results.Case(mode="lora"), results.Case(optimizer=True)]
    limit = budget.Budget(100.0, clock=iter([0.0, 0.0, 60.0, 60.0, 60.0, 60.0]).__next__)
    *_, record = model.steps_of(QWEN.tiny(), cases, limit, 1, "cpu")
    assert [row["skipped"] for row in record["rows"]] == [
        "failed: TypeError: no such argument",
        *2 * ["no time left (--seconds)"],
    ]
    assert "TypeError" in capsys.readouterr().err
    *_, record = model.steps_of(QWEN.tiny(), cases[1:2], budget.Budget(100.0), 1, "cpu")
    assert record["rows"][0]["skipped"] == "CUDA out of memory"


@pytest.mark.parametrize("option", ["--backends", "--modes", "--weights", "--cuts"])
def test_a_typo_ends_the_run(monkeypatch, tmp_path, option):
    with pytest.raises(SystemExit, match=r"no .*'fast'"):
        run(monkeypatch, tmp_path, option, "fast")


def test_cases_are_chosen():
    asked = {"modes": "full", "weights": "bf16", "backends": "grouped_mm," + model.OPTIMIZED, "extras": True}
    cases = model.chosen(SimpleNamespace(**asked))
    assert cases == [case for case in model.CASES if case.weights == "bf16" and case.mode == "full"][:1] + [
        case
        for case in model.CASES[1:]
        if case.weights == "bf16" and case.mode == "full" and case.backend != "fastexperts"
    ]
    assert len(cases) == 8
    assert len(model.chosen(SimpleNamespace(**asked | {"extras": False}))) == 2


def test_clocks_of_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1755)
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 60)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 649_600)
    calls = []
    times, state = step.step_times(lambda: calls.append(None), 3, "cuda")
    assert len(times) == len(calls) == 3
    assert state == "1755 MHz, 60 °C, 650 W"
    monkeypatch.delattr(torch.cuda, "power_draw")
    assert step.card_state() is None


def test_kept_memory(monkeypatch):
    allocated = iter([5 * step.GIB, 8 * step.GIB])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    seen = []
    training = SimpleNamespace(trained=[weight], forward=lambda: seen.append(weight.grad))
    training.forget = lambda: step.Training.forget(training)
    assert step.kept_gib(training) == 3.0
    assert seen == [None]


def test_rows_of_curves():
    kind = "bf16", "fastexperts"
    drawn = {
        (0, curves.EXACT, "grouped_mm"): [5.0, 4.0],
        (0, "bf16", "grouped_mm"): [5.0, 4.5],
        (0, *kind): [5.25, 4.5],
        (1, curves.EXACT, "grouped_mm"): [6.0, 3.0],
        (1, *kind): [6.0, 4.0],
        (2, *kind): [9.0, 9.0],  # its fp32 curve was not drawn
    }
    assert curves.rows_of(drawn) == [
        results.CurveRow("bf16", "grouped_mm", 1, 0.25, 4.5, 4.0),
        results.CurveRow(*kind, 2, 0.375, 4.25, 3.5),
    ]


def test_curves_begin_with_the_same_weights_and_batches():
    plan = replace(curves.TINY, steps=3)
    for mine, other in zip(curves.batches(plan, 1, "cpu"), curves.batches(plan, 1, "cpu"), strict=True):
        assert torch.equal(mine, other)
        assert mine.shape == (2, 32)
    assert not torch.equal(next(curves.batches(plan, 1, "cpu")), next(curves.batches(plan, 2, "cpu")))
    drawn = {
        weights: curves.curve(plan, 0, weights, "grouped_mm", "cpu")["losses"]
        for weights in (curves.EXACT, "bf16", "fp32")
    }
    exact = drawn[curves.EXACT]
    assert exact[2] < exact[0] - 0.03
    for weights in ("bf16", "fp32"):
        assert drawn[weights] == pytest.approx(exact, abs=0.03)
        assert drawn[weights] != exact


def test_page_of_curves_and_trainers():
    rows = [
        results.CurveRow("bf16", "grouped_mm", 3, 0.02, 1.5, 1.51),
        results.CurveRow("bf16", model.OPTIMIZED, 3, 0.025, 1.5, 1.51),
    ]
    skipped = {"2 fp32 fastexperts": "no time left (--seconds)"}
    found = {
        "parameters": 1000,
        "steps": 200,
        "seeds": 3,
        "rows": [asdict(row) for row in rows],
        "skipped": skipped,
    }
    text = report.page({"model-curves": {"environment": ENVIRONMENT, "curves": found}})
    assert "| bf16 | fastexperts + optimize | 3 | 2.50e-02 | **1.25** | 1.5000 | 1.5100 |" in text
    assert "Skipped: 2 fp32 fastexperts: no time left (--seconds)." in text

    default = results.TrainerRow("full", "grouped_mm", 1156.0, 14171.0, 0.065, 0.0655, 45.8, 12.0)
    ours = replace(default, backend=model.OPTIMIZED, step_ms=289.0, note="norms on")
    left = results.TrainerRow("lora", "grouped_mm", skipped="CUDA out of memory")
    found = step.describe(QWEN, None) | {
        "trl": "1.16",
        "steps": 10,
        "rows": [asdict(r) for r in (default, ours, left)],
    }
    text = report.page({"trainer": {"environment": ENVIRONMENT, "trainer": found}})
    assert (
        "| full | fastexperts + optimize | 6.5% | 6.6% | 0.992 | 14,171 | 45.8 | 289.0 | 4.00 x | 12.0000 |"
        in text
    )
    assert "| lora | grouped_mm | - | - | - | - | - | - | - | skipped: CUDA out of memory |" in text
    assert "```\nnorms on\n```" in text


@pytest.mark.slow
def test_the_trainer_counts_as_the_benchmark_does():
    """MFU over tokens a second is FLOPs a token over the peak, whatever the machine's load."""
    trainer = pytest.importorskip("trainer", exc_type=ImportError)
    cases = [results.Case(mode=mode, backend=backend) for mode in model.MODES for backend in step.BACKENDS]
    *_, record = trainer.trainings(QWEN.tiny(), cases, budget.Budget(100.0), 3, "cpu")
    rows = [results.TrainerRow(**row) for row in record["rows"] if not row["skipped"]]
    assert [row.mode for row in rows].count("full") == [row.mode for row in rows].count("lora") >= 2
    for row in rows:
        training = step.Training(QWEN.tiny(), results.Case(mode=row.mode), "cpu")
        flops = training.flops.by("causal").total
        assert row.mfu_logged / row.tokens_per_s == pytest.approx(flops / trainer.NO_PEAK, rel=1e-3)
        clocked = QWEN.tiny().tokens / (row.step_ms / 1e3) * flops / trainer.NO_PEAK
        assert row.mfu_clocked == pytest.approx(clocked, rel=1e-6)
        assert row.loss == pytest.approx(rows[0].loss, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "options"),
    [
        ("deepseek-v3", ["--modes", "full", "--weights", "bf16"]),
        ("glm4.5-air", ["--modes", "lora", "--weights", "fp32"]),
        ("ernie4.5-21b-a3b", ["--weights", "bf16", "--no-extras"]),
        ("dots1", ["--modes", "lora", "--weights", "bf16"]),
    ],
)
def test_other_families_run_in_every_case(monkeypatch, tmp_path, cut, options):
    monkeypatch.setattr(step, "WARMUP", 1)
    run(monkeypatch, tmp_path, "--steps", "1", "--cuts", cut, *options)
    found = json.loads((tmp_path / f"model-{cut}.json").read_text())
    rows = model_report.step_rows_of(found["model"])
    assert len(rows) == {"deepseek-v3": 9, "glm4.5-air": 5}.get(cut, 6)
    assert [row for row in rows if row.skipped and "optimize" not in row.skipped] == []
    measured = [row for row in rows if not row.skipped]
    assert all(row.parts["dense MLPs"] and "not attributed" not in row.parts for row in measured)
    assert any("optimizer" in row.parts for row in measured) == (cut == "deepseek-v3")


@pytest.mark.slow
def test_curves_from_arguments_to_page(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--curves")
    found = json.loads((tmp_path / "model-curves.json").read_text())
    rows = [results.CurveRow(**row) for row in found["curves"]["rows"]]
    assert {(row.weights, row.backend) for row in rows} >= {
        (weights, backend) for weights in ("bf16", "fp32") for backend in ("grouped_mm", "fastexperts")
    }
    assert all(row.seeds == 2 and row.deviation < 0.05 for row in rows)
    assert "## Loss curves in bf16" in report.page({"model-curves": found})


def test_our_step_is_the_default_s():
    """What is measured is the same training: loss and gradients."""
    names = [name for name in step.BACKENDS if name != model.OPTIMIZED or hasattr(fastexperts, "optimize")]
    default, *others = [
        step.Training(QWEN.tiny(), results.Case(weights="fp32", backend=name), "cpu") for name in names
    ]
    for training in (default, *others):
        training.autocast = False
        training.step()
    wanted = dict(default.model.named_parameters())
    for training in others:
        assert training.model.config._experts_implementation == "fastexperts"
        for name, parameter in training.model.named_parameters():
            difference = (parameter.grad - wanted[name].grad).norm()
            assert difference <= 1e-5 * wanted[name].grad.norm(), name


def test_the_mask_of_attention_s_benchmark():
    mask = attention.padding(3, 8, "cpu")[:, 0]
    assert [torch.equal(mask[i, :, : 8 - i], mask[0, :, : 8 - i]) for i in range(3)] == [True] * 3
    assert torch.equal(mask[0], torch.ones(8, 8, dtype=torch.bool).tril())
    assert not any(mask[i, :, 8 - i :].any() for i in range(3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernels_are_called_alike_and_compared(masked):
    heads = attention.Heads(4, 2, 16, 16)
    assert heads.flops(1, 2) == 2 * 2 * 4 * 16 * 3  # two products, 2 FLOPs, 4 heads, 16 dims, 1 + 2 keys
    few = {name: attention.BACKENDS[name] for name in ("math", "cudnn", "sdpa")}
    tensors = heads.tensors(2, 32, "cpu", torch.float32)
    mask = attention.padding(2, 32, "cpu") if masked else None
    running, said = attention.compared(tensors, few, mask)
    assert set(running) == {(name, call) for name in ("math", "sdpa") for call in ("forward", "step")}
    assert said[0] == "math: out 0e+00, dq 0e+00"
    assert said[1].startswith("cudnn: ")
    assert said[2].startswith("sdpa: ")
    assert all(time > 0 for time in attention.new_shape(None, tensors))
    out, dq, dk, dv = running["math", "step"]()
    assert [tuple(t.shape) for t in (out, dq, dk, dv)] == [(2, 4, 32, 16)] * 2 + [(2, 2, 32, 16)] * 2
