"""Models sharded by transformers over processes: loss and every gradient are those of one process.

Ranks are processes on one machine over gloo, in fp32. The reference is transformers' eager without any
sharding, on the batches of all ranks together.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from distributed_process import ATTENTION, adapted, next_token_loss
from support_hf import TINY, assert_close, relative, tiny_model, tokens
from support_matrix import cell
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import fastexperts

PROCESS = Path(__file__).parent / "distributed_process.py"
GPT_OSS = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 16}
FAMILIES = {"qwen3_moe": 2, "deepseek_v3": 1, "gpt_oss": 2}  # layers with experts
EXPERTS, INTERMEDIATE = 8, 16
VOCABULARY = 96  # transformers 5.17 wants one that the ranks divide

SIZES = {field.name for field in fields(DistributedConfig)}


class Mode(NamedTuple):
    """`ranks` processes under DistributedConfig(**sizes); each has `experts` experts of `intermediate`."""

    ranks: int
    sizes: dict
    experts: int = EXPERTS
    intermediate: int = INTERMEDIATE

    @property
    def columns(self) -> list[str]:
        """Of docs/support.md."""
        parallel = {
            "FSDP2": "fsdp_size" in self.sizes,
            "tensor parallel": self.intermediate < INTERMEDIATE,
            "expert parallel": self.experts < EXPERTS,
        }
        return [column for column, used in parallel.items() if used]


TP2 = Mode(2, {"tp_size": 2}, intermediate=INTERMEDIATE // 2)
ALL_REDUCE = Mode(2, {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}, experts=EXPERTS // 2)
if "ep_size" not in SIZES:  # transformers 5.17 has this expert parallelism alone, under another name
    ALL_REDUCE = ALL_REDUCE._replace(sizes={"tp_size": 2, "enable_expert_parallel": True})
ALL_TO_ALL = Mode(2, {"fsdp_size": 2, "ep_size": 2}, experts=EXPERTS // 2)
ON_FOUR = Mode(4, {"fsdp_size": 4, "ep_size": 4}, experts=EXPERTS // 4)
MODES = {
    "tp 2": TP2,
    "ep = tp = 2, all-reduce": ALL_REDUCE,
    "ep = tp = 2, all-to-all": Mode(2, {"tp_size": 2, "ep_size": 2}, experts=EXPERTS // 2),
    "fsdp 2": Mode(2, {"fsdp_size": 2}),
    "fsdp = ep = 2": ALL_TO_ALL,
    "fsdp = ep = 4": ON_FOUR,
    "fsdp 4, ep 2": Mode(4, {"fsdp_size": 4, "ep_size": 2}, experts=EXPERTS // 2),
    # transformers 5.17, which knows no ep_size, has wrong gradients here, with eager too
    "fsdp 2, tp 2": Mode(4, {"fsdp_size": 2, "tp_size": 2, "ep_size": 1}, intermediate=INTERMEDIATE // 2),
}


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()


def test_a_model_sharded_over_two_ranks(checkpoints, tmp_path):
    case = {"checkpoint": checkpoints["qwen3_moe"], "sizes": ALL_TO_ALL.sizes}
    (ranks,) = run(2, tmp_path, ("gradients", case))
    assert_as_in_one_process(ranks, ALL_TO_ALL, checkpoints["qwen3_moe"], "qwen3_moe")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_every_gradient_are_those_of_one_process(mode, checkpoints, tmp_path, record_property):
    for family, column in product(FAMILIES, MODES[mode].columns):
        cell(record_property, column, family)
    cases = [
        (family, {"checkpoint": path, "sizes": MODES[mode].sizes, "checkpointing": checkpointing})
        for family, path in checkpoints.items()
        for checkpointing in (False, True)
    ]
    results = run(MODES[mode].ranks, tmp_path, *(("gradients", case) for _, case in cases))
    for ranks, (family, case) in zip(results, cases, strict=True):
        assert_as_in_one_process(
            ranks, MODES[mode], case["checkpoint"], family, forwards=1 + case["checkpointing"]
        )


@pytest.mark.slow
def test_a_rank_whose_experts_get_no_token_keeps_up(checkpoints, tmp_path):
    path = starve(checkpoints["deepseek_v3"], tmp_path)
    wanted = torch.tensor(curve_of_one_process(path, 50), dtype=torch.float64)
    assert wanted[-1] < 0.5 * wanted[0], "it trains"
    cases = ({"checkpoint": path, "sizes": mode.sizes, "steps": 50} for mode in (ALL_REDUCE, ALL_TO_ALL))
    reduced, exchanged = run(2, tmp_path, *(("starved", case) for case in cases))
    for busy, idle in (reduced, exchanged):
        assert all(difference > 0 for difference in busy["moved"].values())
        assert set(idle["moved"].values()) == {0.0}
        losses = torch.tensor([busy["losses"], idle["losses"]], dtype=torch.float64).mean(0)
        assert losses.isfinite().all()
        assert ((losses - wanted).abs() / wanted)[:10].max() <= 1e-5
    for call in reduced[1]["calls"]:
        assert (call["ids"] == call["experts"]).all(), "sentinels alone"
    for call in exchanged[1]["calls"]:
        assert call["x"].shape[0] == 1, "the row that transformers makes up for an empty batch"
        assert not call["x"].any()


@pytest.mark.slow
def test_saved_from_four_ranks_and_loaded_by_one(checkpoints, tmp_path):
    """And `enable` switches a model that is sharded already."""
    path, out, lr = checkpoints["qwen3_moe"], tmp_path / "out", 0.5
    case = {"checkpoint": path, "sizes": ON_FOUR.sizes, "out": str(out), "lr": lr}
    (ranks,) = run(4, tmp_path, ("trained_and_saved", case))
    ids = torch.load(Path(path) / "ids.pt")
    model = reference_model(path)
    before = model(ids).logits
    next_token_loss(before, ids).backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    after = model(ids).logits
    assert relative(after, before) > 0.01, "the step is seen"
    for rank in ranks:
        assert rank["rows"] == [(True, EXPERTS)] * FAMILIES["qwen3_moe"]
        assert "fastexperts::moe_mlp" in rank["ops"]
        assert relative(rank["logits"], after) <= 1e-5
    for implementation in ("eager", "fastexperts"):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            out, experts_implementation=implementation, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert relative(loaded.eval()(ids).logits, ranks[0]["logits"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_model_that_accelerate_prepared(kind, checkpoints, tmp_path):
    path = checkpoints["qwen3_moe"]
    cases = ({"checkpoint": path, "kind": kind, "adapters": adapters} for adapters in (False, True))
    full, lora = run(2, tmp_path, *(("with_accelerate", case) for case in cases))
    for ranks, model in ((full, reference_model(path)), (lora, adapted(reference_model(path), ATTENTION))):
        assert {rank["sharded"] for rank in ranks} == {kind == "fsdp2"}
        wanted = reference_of(model, torch.load(Path(path) / "ids.pt"))
        assert_ranks_agree_with(wanted, ranks, Mode(2, {"fsdp_size": 2}), layers=FAMILIES["qwen3_moe"])
    assert all("lora" in name for name in lora[0]["gradients"])
    wrapped = len(ATTENTION) * FAMILIES["qwen3_moe"]
    assert [rank["linear"] for rank in lora] == [wrapped] * 2, "ours, and not PEFT's"


@pytest.mark.slow
def test_what_would_be_wrong_is_refused(checkpoints, tmp_path):
    """Adapters over experts of other ranks (PEFT makes factors for all), and biased experts under a plan with
    which transformers' own eager adds the down bias on both ranks: its logits are 17 % off.
    """
    experts = "model.layers.*.mlp.experts"
    plan = {
        experts: "moe_tp_experts",
        f"{experts}.gate_up_proj": "rowwise",  # [E, D, 2F]
        f"{experts}.gate_up_proj_bias": "rowwise",
        f"{experts}.down_proj": "colwise",  # [E, F, D]
    }
    adapter = {"checkpoint": checkpoints["qwen3_moe"], "sizes": ALL_TO_ALL.sizes}
    biased = {"checkpoint": checkpoints["gpt_oss"], "sizes": {"tp_size": 2, "tp_plan": plan}}
    cases = (("adapters_over_sharded_experts", adapter), ("gradients", biased))
    adapters, biases = run(2, tmp_path, *cases)
    for rank in adapters:
        assert "got an adapter of 8 experts, 4 of which are on this rank" in rank["refusal"]
        assert "without expert parallelism" in rank["refusal"]
    for rank in biases:
        assert "`has_bias` got True under tensor parallelism" in rank["refusal"]
        assert "out of tp_plan" in rank["refusal"]


@pytest.mark.slow
def test_routing_is_watched_and_balanced_as_in_one_process(checkpoints, tmp_path):
    """Whatever experts a rank holds; ranks that share a batch count it each, which changes no ratio."""
    path = checkpoints["deepseek_v3"]
    modes = (TP2, ALL_REDUCE, ALL_TO_ALL, Mode(2, {"fsdp_size": 2}))
    results = run(2, tmp_path, *(("routing", {"checkpoint": path, "sizes": mode.sizes}) for mode in modes))
    model, ids = reference_model(path), torch.load(Path(path) / "ids.pt")
    router, taken = model.model.layers[1].mlp.gate, []
    router.register_forward_hook(lambda *call: taken.append(call[2]))
    model(ids)
    logits, index = taken[0][0].detach(), taken[0][2]
    load = torch.bincount(index.flatten(), minlength=EXPERTS)
    p = logits.double().sigmoid() / logits.double().sigmoid().sum(-1, keepdim=True)
    moved = router.e_score_correction_bias + 0.01 * torch.sign(load.double().mean() - load).float()
    for mode, ranks in zip(modes, results, strict=True):
        for rank in ranks:
            assert rank["said"] == []
            assert rank["load"].tolist() == [(load * mode.sizes.get("tp_size", 1)).tolist()]
            (entry,) = rank["logs"]
            assert entry["entropy"] == [pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)]
            assert entry["logit_norm"] == [pytest.approx(float(logits.square().mean().sqrt()), rel=1e-5)]
            assert entry["max_violation"] == [pytest.approx(float(load.max() / load.double().mean() - 1))]
            (bias,) = rank["biases"].values()
            torch.testing.assert_close(bias, moved, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> folder of a tiny model and of ids, whose rows are the ranks' batches."""
    paths = {}
    for family in FAMILIES:
        paths[family] = str(tmp_path_factory.mktemp(family))
        with mock.patch.dict(TINY, {"gpt_oss": GPT_OSS}):
            tiny_model(family, "eager", vocab_size=VOCABULARY).save_pretrained(paths[family])
        torch.save(tokens(batch=4, vocabulary=VOCABULARY), Path(paths[family]) / "ids.pt")
    return paths


def run(ranks, folder, *jobs, seconds=150):
    """What each of `jobs`, (function of distributed_process.py, keywords), returned on each of the ranks."""
    unknown = {size for _, keywords in jobs for size in keywords.get("sizes", ()) if size not in SIZES}
    if unknown:
        pytest.skip(f"this transformers' DistributedConfig has no {', '.join(sorted(unknown))}")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",  # accelerate asks for it; the ranks meet in a file
    }
    command = [sys.executable, str(PROCESS), str(folder), json.dumps(jobs)]
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
    try:
        wait_for(processes, logs, seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]
    return list(zip(*results, strict=True))


def wait_for(processes, logs, seconds):
    """Returns once all have ended well; a rank that failed ends the others, which would wait for it."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        for process, log in zip(processes, logs, strict=True):
            assert not process.poll(), log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"hangs: {[log.read_text()[-500:] for log in logs]}"
        time.sleep(0.1)
    assert {process.returncode for process in processes} == {0}, logs[0].read_text()[-3000:]


def assert_as_in_one_process(ranks, mode, path, family, forwards=1):
    if family == "gpt_oss" and mode.experts == EXPERTS:
        # transformers has no tensor-parallel plan for these experts: each rank has them whole
        mode = mode._replace(intermediate=INTERMEDIATE)
    wanted = reference_of(reference_model(path), torch.load(Path(path) / "ids.pt"))
    assert_ranks_agree_with(wanted, ranks, mode, FAMILIES[family], forwards)


def assert_ranks_agree_with(wanted, ranks, mode, layers, forwards=1):
    """Loss, logits and gradients are `wanted`, from `layers` local experts modules that ran on our ops."""
    shards, per_shard = mode.sizes.get("fsdp_size", 1), mode.sizes.get("tp_size", 1)
    ids = [rank["ids"] for rank in ranks[::per_shard]]
    assert len({tuple(batch.flatten().tolist()) for batch in ids}) == shards, "each has its own batch"
    losses = torch.stack([rank["loss"] for rank in ranks])
    assert relative(losses.mean(), wanted["loss"]) <= 1e-5
    assert relative(torch.cat([rank["logits"] for rank in ranks[::per_shard]]), wanted["logits"]) <= 1e-5
    for rank in ranks:
        assert_close(rank["gradients"], wanted["gradients"], tolerance=1e-5)
        assert len(rank["calls"]) == layers * forwards
        for call in rank["calls"]:
            assert (call["experts"], call["intermediate"]) == (mode.experts, mode.intermediate)
            assert call["plain"]
        assert rank["ops"].count("fastexperts::moe_mlp") == layers * forwards
        assert rank["ops"].count("fastexperts::moe_mlp_backward") == layers
        assert not {"transformers::grouped_mm_fallback", "aten::_grouped_mm"} & set(rank["ops"])


def reference_model(path):
    return AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="eager", dtype=torch.float32
    ).train()


def reference_of(model, ids):
    logits = model(ids).logits
    loss = next_token_loss(logits, ids)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits.detach(), "gradients": gradients}


def starve(path, folder):
    """A copy of a deepseek_v3 model whose correction bias lets the first half of the experts win."""
    model = reference_model(path)
    for name, tensor in model.state_dict().items():
        if "e_score_correction_bias" in name:
            tensor[: EXPERTS // 2] += 10
    starved = folder / "starved"
    model.save_pretrained(starved)
    torch.save(torch.load(Path(path) / "ids.pt"), starved / "ids.pt")
    return str(starved)


def curve_of_one_process(path, steps):
    model, ids = reference_model(path), torch.load(Path(path) / "ids.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, foreach=False)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(model(ids).logits, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
