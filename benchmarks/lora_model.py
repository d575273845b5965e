"""A whole training step of LoRA on Qwen3-30B-A3B's geometry: PEFT + grouped_mm against fastexperts.

    python benchmarks/lora_model.py --output benchmarks/results/lora-model
    python benchmarks/lora_model.py --layers 48 --batch 1 --length 4096 --optimizer --loss-chunk 1024 \\
        --implementations fastexperts --output benchmarks/results/lora-30b

The model is made on the meta device and drawn in place on the card in bf16, so that no second copy exists:
48 layers are 61 GB. LoRA is `get_peft_model` with its defaults (factors in fp32) on q, k, v, o and both
projections of all experts. Gradient checkpointing, sdpa, no cache. Every implementation runs on the same
model, taking turns; with --optimizer, fused AdamW updates the factors and the step includes it.

The loss is the model's own (`labels`), whose logits are [tokens, 151936] in fp32 and more; with
--loss-chunk N it is the same cross-entropy over N tokens at a time, each chunk's logits recomputed in
backward.

MFU counts 4 FLOPs a parameter that a token passes (forward and the gradients of activations: frozen weights
have none), embedding left out, and causal attention twice its forward, over 989 TF/s. Neither the update nor
what checkpointing recomputes counts.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from cuts import QWEN3
from results import environment, write
from timing import take_turns
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastexperts

PEAK_FLOPS = 989e12  # dense bf16 of one H100 SXM
GIB = 1 << 30
GEOMETRY: dict[str, Any] = {**QWEN3, "use_cache": False}
TARGETS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
IMPLEMENTATIONS = {"peft": "grouped_mm", "fastexperts": "fastexperts"}


def build(geometry: dict[str, Any], rank: int, device: str, seed: int = 0) -> nn.Module:
    """A PEFT model in training mode, its weights drawn in place on `device`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**geometry)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    model.to_empty(device=device)
    with torch.device(device):  # its buffers follow from the config, and to_empty left them undefined
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, model.config.initializer_range, generator=generator)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **TARGETS)
    with torch.device(device):
        model = get_peft_model(model, config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def select(model: nn.Module, implementation: str) -> None:
    """Of the experts; a module reads it from its config at every call."""
    model.get_base_model().config._experts_implementation = IMPLEMENTATIONS[implementation]


def flops_per_token(config: Any, length: int) -> float:
    """Of a step that trains LoRA alone, see above."""
    heads = config.num_attention_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    experts = config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    router = config.hidden_size * config.num_experts
    head = config.hidden_size * config.vocab_size
    passed = config.num_hidden_layers * (attention + experts + router) + head
    scores = config.num_hidden_layers * 2 * length * heads  # of forward: two products, half of them masked
    return 4 * passed + 2 * scores


def chunked_loss(model: nn.Module, ids: Tensor, chunk: int) -> Tensor:
    """The mean cross-entropy of next tokens, `chunk` tokens' logits at a time."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(causal.lm_head(rows).float(), wanted, reduction="sum")

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    sums = [checkpoint(part, *pair, use_reentrant=False) for pair in parts]
    return torch.stack(sums).sum() / len(targets)


def step_of(
    model: nn.Module, ids: Tensor, chunk: int, optimizer: torch.optim.Optimizer | None
) -> Callable[[], Tensor]:
    """Forward and backward, and the update where there is an optimizer; returns the loss."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        for parameter in trainable:
            parameter.grad = None
        loss = chunked_loss(model, ids, chunk) if chunk else model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer:
            optimizer.step()
        return loss.detach()

    return step


def measure(
    model: nn.Module, names: list[str], step: Callable[[], Tensor], tokens: int, flops: float
) -> list[dict[str, Any]]:
    """A row for each implementation."""

    def under(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            select(model, name)
            return step()

        return call

    calls = {name: under(name) for name in names}
    losses, peaks = {}, {}
    for name, call in calls.items():
        losses[name] = [float(call())]
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses[name].append(float(call()))
        peaks[name] = torch.cuda.max_memory_allocated() / GIB
    times = take_turns(calls)
    made = []
    for name, call in calls.items():
        speed = 1e3 * tokens / times[name].ms
        made.append(
            {
                "implementation": name,
                "step_ms": times[name].ms,
                "host_ms": times[name].host_ms,
                "tokens_per_s": speed,
                "mfu": speed * flops / PEAK_FLOPS,
                "peak_gib": peaks[name],
                "losses": [*losses[name], float(call())],
            }
        )
        print(made[-1], flush=True)
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--optimizer", action="store_true", help="AdamW on the factors, in the step")
    parser.add_argument("--loss-chunk", type=int, default=0, help="tokens; 0: the model's own loss")
    parser.add_argument("--output", help="without a suffix")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    names = args.implementations.split(",")
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise SystemExit(f"no implementation {name!r}: one of {', '.join(IMPLEMENTATIONS)}")
    import peft

    fastexperts.register()
    where = environment() | {"peft": peft.__version__}
    print(where, flush=True)
    model = build(GEOMETRY | {"num_hidden_layers": args.layers}, args.rank, "cuda")
    config = model.get_base_model().config
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator("cuda").manual_seed(1)
    shape = args.batch, args.length
    ids = torch.randint(config.vocab_size, shape, device="cuda", generator=generator)
    flops = flops_per_token(config, args.length)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if args.optimizer else None
    step = step_of(model, ids, args.loss_chunk, optimizer)
    found = {
        "layers": args.layers,
        "batch": args.batch,
        "length": args.length,
        "rank": args.rank,
        "optimizer": args.optimizer,
        "loss_chunk": args.loss_chunk,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops,
        "rows": measure(model, names, step, ids.numel(), flops),
    }
    if args.output:
        write(args.output, {"environment": where, "lora_model": found})


if __name__ == "__main__":
    main()
