"""Experts that are not plain SwiGLU, as transformers stores them, against our own plain layer, in one run.

    python benchmarks/families.py --output benchmarks/results/families

For each of shapes.SPECIALS at 16,384 balanced tokens in bf16, forward and forward + backward with all
gradients: ours with the family's gate, biases and layout, and, taking turns, ours as SwiGLU without biases
in the canonical layout. Both in TF/s of their own matrix products: a layer without gate has a third less.

OUTPUT.json is written after every family; benchmarks/report.py makes a table of it.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, replace

import torch
from results import FamilyRow, environment, write
from shapes import SPECIALS, Special, routing
from timing import take_turns
from torch import Tensor

from fastexperts import ACTIVATIONS, Activation, Weight, moe_mlp

PLAIN = ACTIVATIONS["swiglu"]
DEVICE = "cuda"


class Layer:
    """One layer of random experts and its tokens; `special` as its family stores it, else canonical."""

    def __init__(self, special: Special, tokens: int, *, plain: bool, device: str) -> None:
        shape = special.shape
        self.activation = PLAIN if plain else gate_of(special)
        generator = torch.Generator(device).manual_seed(0)
        stored, bias = special.stored and not plain, special.bias and not plain
        d, f, g, e = shape.dim_d, shape.dim_f, self.activation.parts * shape.dim_f, shape.experts
        self.flops = 2 * tokens * shape.top_k * d * (g + f)

        def normal(*dims: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*dims, device=device, dtype=torch.bfloat16, generator=generator)
            return values.mul_(scale).requires_grad_()

        self.ids_TK, weight_TK = routing(shape, tokens, "balanced", device)
        self.x_TD, self.weight_TK, self.dout_TD = (
            normal(tokens, d),
            weight_TK.requires_grad_(),
            normal(tokens, d),
        )
        w1 = normal(e, *((d, g) if stored else (g, d)), scale=d**-0.5)
        w2 = normal(e, *((f, d) if stored else (d, f)), scale=f**-0.5)
        self.w1 = Weight(w1, stored, normal(e, g) if bias else None)
        self.w2 = Weight(w2, stored, normal(e, d) if bias else None)

    def forward(self) -> Tensor:
        return moe_mlp(self.x_TD, self.ids_TK, self.weight_TK, self.w1, self.w2, activation=self.activation)

    def step(self) -> tuple[Tensor, ...]:
        leaves = [self.x_TD, self.weight_TK, self.w1.w, self.w2.w, self.w1.bias, self.w2.bias]
        return torch.autograd.grad(
            self.forward(), [leaf for leaf in leaves if leaf is not None], self.dout_TD
        )


def gate_of(special: Special) -> Activation:
    return replace(ACTIVATIONS[special.activation], limit=special.limit, interleaved=special.stored)


def row(special: Special, tokens: int) -> FamilyRow:
    layers = {plain: Layer(special, tokens, plain=plain, device=DEVICE) for plain in (False, True)}
    calls = {}
    for plain, layer in layers.items():
        calls[plain, "forward"], calls[plain, "step"] = layer.forward, layer.step
    times = take_turns(calls)

    def tflops(plain: bool) -> tuple[float, float]:
        flops = layers[plain].flops
        return flops / times[plain, "forward"].ms / 1e9, 3 * flops / times[plain, "step"].ms / 1e9

    return FamilyRow(special.shape.name, tokens, *tflops(False), *tflops(True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(SPECIALS))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", help="without a suffix")
    args = parser.parse_args()
    where, rows = environment(), []
    for name in args.families.split(","):
        rows.append(row(SPECIALS[name], args.tokens))
        print(rows[-1], rows[-1].shares, flush=True)
        if args.output:
            write(args.output, {"environment": where, "families": {"rows": [asdict(row) for row in rows]}})
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
