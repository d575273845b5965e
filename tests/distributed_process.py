"""One rank of a distributed test: `python distributed_process.py FOLDER JOBS` (see test_distributed.py).

JOBS are [function of this file, its keywords] in JSON; what they return goes to FOLDER/rank-N.pt.
"""

import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from support_hf import Ops
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf import linear_lora
from fastexperts.hf.optimize import PARTS

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "o_proj"]


def load(checkpoint, sizes, implementation="fastexperts"):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        experts_implementation=implementation,
        dtype=torch.float32,
        distributed_config=DistributedConfig(**sizes) if sizes else None,
    ).train()


def batch_of_rank(ids, sizes):
    """The rows of `ids` that this rank trains on: ranks of a tensor-parallel group share theirs."""
    return ids.chunk(sizes.get("fsdp_size", 1))[dist.get_rank() // sizes.get("tp_size", 1)]


def next_token_loss(logits, ids):
    return nnf.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def what_experts_receive(implementation="fastexperts"):
    """Records the local (E, F), the ids and the tokens of each call of our experts function."""
    function, calls = ALL_EXPERTS_FUNCTIONS[implementation], []

    def recorded(module, x_TD, ids_TK, weight_TK):
        down = module.down_proj
        calls.append(
            {
                "experts": down.shape[0],
                "intermediate": down.shape[1 if module.is_transposed else 2],
                "plain": type(module.down_proj) in (torch.Tensor, torch.nn.Parameter),
                "x": x_TD.detach(),
                "ids": ids_TK,
                "weights": weight_TK.detach(),
            }
        )
        return function(module, x_TD, ids_TK, weight_TK)

    ALL_EXPERTS_FUNCTIONS.register(implementation, recorded)
    try:
        yield calls
    finally:
        ALL_EXPERTS_FUNCTIONS.register(implementation, function)


def gradients(checkpoint, sizes, checkpointing=False):
    """The loss, the logits and every gradient of this rank's batch; or the refusal."""
    model, ids = load(checkpoint, sizes), torch.load(Path(checkpoint) / "ids.pt")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return measured(model, batch_of_rank(ids, sizes))


def measured(model, ids, backward=torch.Tensor.backward):
    with what_experts_receive() as calls, Ops() as ops:
        try:
            logits = model(ids).logits
        except FastexpertsError as e:
            return {"refusal": str(e)}
        loss = next_token_loss(logits, ids)
        backward(loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "ids": ids,
        "loss": loss.detach(),
        "logits": logits.detach(),
        "gradients": {name: whole(p.grad) for name, p in trained.items() if p.grad is not None},
        "calls": calls,
        "ops": ops.names,
    }


def starved(checkpoint, sizes, steps):
    """Losses of `steps` steps, what the experts of this rank received, and what they changed by."""
    model, ids = load(checkpoint, sizes), torch.load(Path(checkpoint) / "ids.pt")
    mine, losses = batch_of_rank(ids, sizes), []
    # without decay a weight whose gradient is zero stays as it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, foreach=False)
    experts = {name: p for name, p in model.named_parameters() if "mlp.experts.down_proj" in name}
    before = {name: p.detach().to_local().clone() for name, p in experts.items()}
    with what_experts_receive() as calls:
        for _ in range(steps):
            loss = next_token_loss(model(mine).logits, mine)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    moved = {name: (p.detach().to_local() - before[name]).abs().max().item() for name, p in experts.items()}
    return {"losses": losses, "calls": calls, "moved": moved}


def trained_and_saved(checkpoint, sizes, out, lr):
    """A sharded model that `enable` switched: the logits after a step of SGD, and a checkpoint of all."""
    model, ids = load(checkpoint, sizes, "eager"), torch.load(Path(checkpoint) / "ids.pt")
    summary = fastexperts.enable(model, verbose=False)
    mine = batch_of_rank(ids, sizes)
    with Ops() as ops:
        next_token_loss(model(mine).logits, mine).backward()
    torch.optim.SGD(model.parameters(), lr=lr, foreach=False).step()
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(out)
    return {"logits": logits, "ops": ops.names, "rows": [(row.served, row.experts) for row in summary.rows]}


def with_accelerate(checkpoint, kind, adapters):
    """Gradients of a model that accelerate prepared: kind "ddp", or "fsdp2"."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    model, ids = load(checkpoint, None), torch.load(Path(checkpoint) / "ids.pt")
    layer = type(model.model.layers[0]).__name__
    if adapters:
        model = adapted(model, ATTENTION)
        assert all(row.on for row in PARTS["adapters"](model, "cpu"))
        spy_lora_linear(calls := [])
    accelerator = Accelerator(cpu=True)
    if kind == "fsdp2":
        # accelerate ignores the plugin where there is no accelerator; this is what it sets where there is one
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer],
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.distributed_type = DistributedType.FSDP
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, _ = accelerator.prepare(model, optimizer)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    result = measured(model, ids.chunk(dist.get_world_size())[dist.get_rank()], accelerator.backward)
    result["gradients"] = {name.removeprefix("module."): g for name, g in result["gradients"].items()}
    return {**result, "sharded": sharded, "linear": len(calls) if adapters else 0}


def spy_lora_linear(calls):
    """A number in `calls` for each call of our function of adapted linear layers, in this process."""
    function = linear_lora.lora_linear

    def counted(*args):
        calls.append(1)
        return function(*args)

    linear_lora.lora_linear = counted


def adapted(model, modules=()):
    """`model` with LoRA on its experts and `modules`, the same in every process."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=[*modules], target_parameters=TARGETS, init_lora_weights=False)
    return get_peft_model(model, config)


def adapters_over_sharded_experts(checkpoint, sizes):
    model, ids = adapted(load(checkpoint, sizes)), torch.load(Path(checkpoint) / "ids.pt")
    return measured(model, batch_of_rank(ids, sizes))


def routing(checkpoint, sizes):
    """The load and the routers' values of all ranks, and the biases after a step of balancing."""
    from fastexperts.metrics.routing_health import RoutingHealth
    from fastexperts.train.balancing import LossFreeBalancing, find_biases

    model, ids = load(checkpoint, sizes), torch.load(Path(checkpoint) / "ids.pt")
    said = []
    health, balancing = RoutingHealth(say=said.append), LossFreeBalancing(0.01, say=lambda line: None)
    ranks = dist.get_world_size()
    args = SimpleNamespace(n_gpu=0, process_index=0, world_size=ranks, device=ids.device, output_dir="")
    state = SimpleNamespace(global_step=0, log_history=[{}])
    for callback in (health, balancing):
        callback.on_train_begin(args, state, None, model=model)
    mine = batch_of_rank(ids, sizes)
    next_token_loss(model(mine).logits, mine).backward()
    balancing.on_optimizer_step(args, state, None)
    health.on_log(args, state, None, logs={"loss": 0.0})
    biases = {name: bias.value.clone() for name, bias in find_biases(model).items()}
    return {"load": health.table.load_LE, "logs": health.table.logs, "biases": biases, "said": said}


JOBS = (gradients, starved, trained_and_saved, with_accelerate, adapters_over_sharded_experts, routing)

if __name__ == "__main__":
    folder, jobs = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    fastexperts.register()
    functions = {function.__name__: function for function in JOBS}
    results = [functions[job](**keywords) for job, keywords in json.loads(jobs)]
    torch.save(results, f"{folder}/rank-{rank}.pt")
    # a rank that leaves while another still talks aborts; for the rest see train/leave.py
    dist.barrier()
    os._exit(0)
