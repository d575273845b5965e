"""Stock PEFT on transformers' eager experts, in a process without fastexperts: `python stock_peft.py FOLDER`.

Each family's folder holds `config`, a LoraConfig, and `adapter`, an adapter to load. Written into it is
`stock.pt`: the losses of training with that config, the factors before and after, logits with the adapter,
and longer curves of several seeds.
"""

import sys
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from support_hf import Ops, tiny_model, tokens

STEPS = 10
LONG, SEEDS = 20, 5  # steps and number of longer curves


@cache
def text():
    """The standard library's topics, printable ASCII, as ids."""
    return torch.tensor([ord(c) - 30 for c in "".join(topics.values()) if " " <= c <= "~"])


def adapted(family, implementation, config, seed=0):
    """The tiny model with an adapter; both start as family and seed tell."""
    model = tiny_model(family, implementation, seed=seed)
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def factors(model):
    """The adapter as PEFT saves it."""
    return {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(model).items()}


def loss_curve(model, steps=STEPS, batch=4, length=32):
    """The losses of `steps` steps of AdamW at 1e-2 on real text."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = text()[step * batch * length :][: batch * length].view(batch, length)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def loss_curves(family, implementation, config):
    """[SEEDS, LONG]"""
    models = (adapted(family, implementation, config, seed) for seed in range(SEEDS))
    return torch.stack([loss_curve(model, LONG) for model in models])


@torch.no_grad()
def logits(model):
    """Logits of fixed tokens, in evaluation."""
    return model.eval()(tokens()).logits


if __name__ == "__main__":
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        config = LoraConfig.from_pretrained(folder / "config")
        model = adapted(folder.name, "eager", config)
        start = factors(model)
        with Ops() as ops:
            losses = loss_curve(model)
        loaded = PeftModel.from_pretrained(tiny_model(folder.name, "eager"), folder / "adapter")
        result = {
            "losses": losses,
            "start": start,
            "end": factors(model),
            "folds": ops.names.count("aten::baddbmm"),
            "logits of adapter": logits(loaded),
            "loaded": factors(loaded),
        }
        for implementation in ("eager", "grouped_mm"):
            result[f"curves of {implementation}"] = loss_curves(folder.name, implementation, config)
        model.save_pretrained(folder / "stock")
        result["logits of stock"] = logits(model)
        torch.save(result, folder / "stock.pt")
    assert not any(name.startswith("fastexperts") for name in sys.modules)
