"""benchmarks/lora.py and lora_model.py: contestants, ratios, FLOPs, and both from end to end on the CPU."""

import functools
import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from support import ROOT
from test_benchmarks import ENVIRONMENT, TINY, FakeEvent

sys.path.insert(0, str(ROOT / "benchmarks"))

import adapters
import lora
import lora_model
import lora_report
import problems
import report
import results
import shapes
import timing

import fastexperts

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

WHERE = ("qwen3-30b", 16384, "balanced")
MEASURED = {"errors": {"out": 1e-3, "a1": 4e-3}, "errors_against": "fp64", "host_ms": 1.0, "peak_mib": 900}
ROWS = [
    results.LoraRow(*WHERE, name, rank=16, forward_ms=2.0, step_ms=ms, kept_mib=kept, baddbmm=n, **MEASURED)
    for name, ms, kept, n in (
        ("frozen", 4.0, 450, 0),
        ("fastexperts", 5.0, 460, 0),
        ("peft", 25.0, 3000, 6),
        ("split", 15.0, 1840, 0),
    )
]
MODEL = {
    "layers": 6,
    "batch": 4,
    "length": 4096,
    "rank": 16,
    "optimizer": False,
    "loss_chunk": 0,
    "trainable": 1000,
    "parameters": 123456,
    "flops_per_token": 3.01e9,
    "rows": [
        {"implementation": "peft", "step_ms": 455.0, "tokens_per_s": 36008.8, "mfu": 0.11, "peak_gib": 37.2}
    ],
}


def adapted(rank=4, dtype=torch.bfloat16):
    """Backends need strides of 16 bytes: dims of TINY are multiples of 8."""
    fastexperts.register()
    experts = problems.make_experts(TINY, dtype, "cpu")
    return adapters.Adapted.make(problems.Problem.make(TINY, 40, "skewed", experts), rank)


@pytest.mark.parametrize("name", adapters.NAMES)
@pytest.mark.parametrize("rank", [8, 16])
def test_contestants_compute_the_same(name, rank):
    on = adapted(rank)
    truth = adapters.loop_fp64(on, with_adapter=name != "frozen")
    found = adapters.Contestant(name, on).results()
    assert len(found) == len(truth) == (3 if name == "frozen" else 7)
    for got, wanted in zip(found, truth, strict=True):
        assert wanted.norm() > 0
        assert problems.relative(got, wanted) < 0.012, name


def test_contestants_are_told_apart_by_exact_numbers():
    """In fp32, where a factor read in the wrong order or a scale of 1.01 shows."""
    on = adapted(4, torch.float32)
    truth = adapters.loop_fp64(on)
    for name in ("fastexperts", "peft"):
        errors = [
            problems.relative(*pair)
            for pair in zip(adapters.Contestant(name, on).results(), truth, strict=True)
        ]
        assert max(errors) < 1e-5, name


def test_a_peer_runs_on_folded_weights(monkeypatch):
    on = adapted(8)

    def peer(problem):
        return lambda: fastexperts.moe_mlp(
            problem.x_TD, problem.ids_TK, problem.weight_TK, problem.w1_EGD, problem.w2_EDF
        )

    monkeypatch.setitem(adapters.PEERS, "liger", peer)
    for got, wanted in zip(adapters.Contestant("liger", on).results(), adapters.loop_fp64(on), strict=True):
        assert problems.relative(got, wanted) < 0.012


def test_factors_are_peft_s_and_not_zero():
    on = adapted(8)
    assert [f.dtype for f in on.factors] == [torch.float32] * 4
    assert [tuple(f.shape) for f in on.factors] == [(64, 64), (64, 64), (64, 32), (64, 64)]
    assert [tuple(f.shape) for f in on.stacked] == [(8, 8, 64), (8, 64, 8), (8, 8, 32), (8, 64, 8)]
    assert all(f.count_nonzero() == f.numel() for f in on.factors)


def test_folds_are_counted():
    on = adapted(8)
    assert lora.folds(adapters.Contestant("fastexperts", on)) == 0
    assert lora.folds(adapters.Contestant("peft", on)) >= 2


def test_ratios():
    text = lora_report.lora_ratios(ROWS)
    assert "| qwen3-30b | 16384 | 16 | **1.250 x** | 3.00 x | 5.00 x | 0.250 |" in text
    broken = [ROWS[1], replace(ROWS[3], skipped="out of memory")]
    assert "| qwen3-30b | 16384 | 16 | - | - | - | - |" in lora_report.lora_ratios(broken)
    flops = 12 * 16384 * 8 * 2048 * 768
    assert ROWS[1].tflops[1] == pytest.approx(flops / 5e9)


def test_sections(tmp_path):
    results.write_lora(str(tmp_path / "lora"), ROWS, ENVIRONMENT)
    record = json.loads((tmp_path / "lora.json").read_text())
    assert results.lora_rows_of(record) == ROWS
    text = report.page({"lora": record, "model": {"environment": ENVIRONMENT, "lora_model": MODEL}})
    assert "| peft | 2.000 | 25.000 | 99 | 1.00 | 3000 | 900 | 4.0e-03 | 6 |" in text
    assert "## A training step of LoRA, 6 layers" in text
    assert "| peft | 455.0 | 36,009 | 11.0% | 37.2 |" in text


def test_flops_are_those_of_the_peers_table():
    """shared/peers.md: 35,997 tokens/s were called 11.0 % of 989 TF/s."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**lora_model.GEOMETRY, num_hidden_layers=6)
    flops = lora_model.flops_per_token(config, 4096)
    assert 35_997 * flops / lora_model.PEAK_FLOPS == pytest.approx(0.110, abs=5e-4)


@pytest.fixture
def fake_card(monkeypatch):
    """What both scripts ask of CUDA, answered for CPU tensors."""

    def on_cpu(function):
        def made(*args, device=None, **kwargs):
            return function(*args, device="cpu" if device == "cuda" else device, **kwargs)

        return made

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    allocated = itertools.count(2**20, 2**20)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    for name in ("empty", "randint"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    fast = functools.partial(timing.take_turns, warmup_ms=0.1, measure_ms=1.0)
    for module in (lora, lora_model):
        monkeypatch.setattr(module, "take_turns", fast)
    monkeypatch.setattr(lora, "make_experts", functools.partial(problems.make_experts, device="cpu"))
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def test_lora_from_arguments_to_page(fake_card, monkeypatch, tmp_path):
    output = tmp_path / "lora"
    command = "lora.py --shapes tiny --ranks 8,16 --tokens 40 --implementations frozen,fastexperts,peft,split"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", str(output)])
    lora.main()
    record = json.loads((tmp_path / "lora.json").read_text())
    rows = results.lora_rows_of(record)
    assert [(row.rank, row.implementation) for row in rows] == [
        (rank, name) for rank in (8, 16) for name in ("frozen", "fastexperts", "peft", "split")
    ]
    assert all(0 < row.largest_error < 0.012 and row.step_ms > 0 for row in rows)
    assert all(0 < row.kept_mib < row.peak_mib for row in rows)
    assert all((row.baddbmm > 0) == (row.implementation == "peft") for row in rows)
    assert record["environment"]["peft"] == peft.__version__
    assert "## LoRA of frozen experts" in report.page({"lora": record})


def test_what_does_not_fit_is_named(fake_card, monkeypatch):
    def too_large(contestant):
        if contestant.name == "peft":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More")
        return {"kept_mib": 1.0, "peak_mib": 2.0}

    monkeypatch.setattr(lora, "memory", too_large)
    rows = lora.rows(adapted(8), ["fastexperts", "peft"])
    assert rows[1].skipped == "CUDA out of memory"
    assert "skipped: CUDA out of memory" in lora_report.lora_table(rows)


SMALL = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
}


def small(layers=2):
    fastexperts.register()
    return lora_model.build(lora_model.GEOMETRY | SMALL | {"num_hidden_layers": layers}, 8, "cpu")


def test_the_model_is_drawn_in_place_and_adapted_everywhere():
    model = small()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * (4 + 2)
    assert all("lora_" in name for name in trainable)
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    for name, p in base.items():
        assert p.float().std() == pytest.approx(0.02, rel=0.2) if p.dim() > 1 else (p == 1).all(), name
    rotary = model.get_base_model().model.rotary_emb.inv_freq
    assert rotary[0] == 1.0
    assert torch.isfinite(rotary).all()


def test_both_implementations_and_both_losses_are_one_step():
    model = small()
    ids = torch.randint(97, (2, 24))
    seen = []
    for name, chunk in (("peft", 0), ("fastexperts", 0), ("fastexperts", 10)):
        lora_model.select(model, name)
        loss = lora_model.step_of(model, ids, chunk, None)()
        seen.append((float(loss), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (stock, grads), *others = seen
    assert stock == pytest.approx(4.57, abs=0.3)  # log 97: an untrained model
    for loss, found in others:
        assert loss == pytest.approx(stock, rel=2e-3)
        moved = [(got, want) for got, want in zip(found, grads, strict=True) if want.norm() > 0]
        assert len(moved) == len(grads) / 2  # B starts at zero: A has no gradient yet
        assert max(problems.relative(*pair) for pair in moved) < 0.05


@pytest.mark.parametrize("optimizer", [False, True])
def test_model_from_arguments_to_page(fake_card, monkeypatch, tmp_path, optimizer):
    monkeypatch.setattr(lora_model, "GEOMETRY", lora_model.GEOMETRY | SMALL)
    build = lora_model.build
    monkeypatch.setattr(lora_model, "build", lambda geometry, rank, device: build(geometry, rank, "cpu"))
    output = tmp_path / "model"
    command = f"lora_model.py --layers 2 --batch 2 --length 16 --rank 8 --output {output}"
    if optimizer:
        command += " --optimizer --loss-chunk 8 --implementations fastexperts"
    monkeypatch.setattr(sys, "argv", command.split())
    lora_model.main()
    record = json.loads((tmp_path / "model.json").read_text())
    rows = record["lora_model"]["rows"]
    assert [row["implementation"] for row in rows] == (
        ["fastexperts"] if optimizer else ["peft", "fastexperts"]
    )
    assert all(row["step_ms"] > 0 and row["mfu"] > 0 for row in rows)
    assert (rows[0]["losses"][-1] < rows[0]["losses"][0] - 1e-4) == optimizer
    assert "## A training step of LoRA, 2 layers" in report.page({"model": record})
