"""What the tests of the core share: the error rule, cases, and their inputs.

Legend: T tokens, K top-k, E experts, D model dim, F expert intermediate dim, G = 2F gated, else F.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from spies import guarded
from torch import Tensor

from fastexperts import ACTIVATIONS, Activation, Weight, moe_mlp, moe_mlp_reference

NAMES = ("x", "weight", "w1", "w2")
BIASES = ("b1", "b2")
ROOT = Path(__file__).parent.parent


# The error rule of numerics.md.

_FLOOR = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
_EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}


class Error:
    """How far `out` is from the fp64 truth, and how far the same-dtype eager loop is, summed over blocks."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.square, self.largest = {}, {}

    def add(self, out: Tensor, eager: Tensor, ref: Tensor) -> None:
        assert out.shape == eager.shape == ref.shape, f"{self.name}: {out.shape} is not {ref.shape}"
        assert ref.dtype == torch.float64
        for key, value in (("out", out.double() - ref), ("eager", eager.double() - ref), ("ref", ref)):
            top = value.abs().amax() if value.numel() else value.new_zeros(())
            self.square[key] = self.square.get(key, 0) + value.square().sum()
            self.largest[key] = torch.maximum(self.largest.get(key, top), top)

    def check(self) -> None:
        out, eager, ref = (float(self.square[key]) ** 0.5 for key in ("out", "eager", "ref"))
        top_out, top_eager, top_ref = (float(self.largest[key]) for key in ("out", "eager", "ref"))
        if self.dtype in _EXACT:
            bound = _EXACT[self.dtype] * ref
        else:
            # the gradient of a routing weight is one inner product of rounded rows
            floor = 2**-8 if self.name == "dweight" and self.dtype == torch.bfloat16 else _FLOOR[self.dtype]
            bound = 2 * max(eager, floor * ref)
        top_bound = 3 * max(top_eager, 2**-8 * top_ref)
        assert ref == 0 or bound < ref / 2, f"{self.name}: a bound of {bound} lets all zeros ({ref}) pass"
        # written so that NaN fails
        assert out <= bound, (
            f"{self.name}: |out - ref| {out:.3e} > {bound:.3e} (|ref| {ref:.3e}, eager {eager:.3e})"
        )
        assert top_out <= top_bound, f"{self.name}: max|out - ref| {top_out:.3e} > {top_bound:.3e}"


def assert_close(out: Tensor, eager: Tensor, ref: Tensor, dtype: torch.dtype, name: str = "out") -> None:
    """The rule for one tensor: `out` computed in `dtype`, `eager` by a plain loop in it, `ref` in fp64."""
    error = Error(name, dtype)
    error.add(out, eager, ref)
    error.check()


# Cases and their inputs.

ACTIVATION_ROWS: dict[str, Activation] = {
    **ACTIVATIONS,
    # limits that N(0, 1) pre-activations reach
    "swiglu clamped": replace(ACTIVATIONS["swiglu"], limit=0.75),
    "gpt_oss clamped": replace(ACTIVATIONS["gpt_oss"], limit=1.0),
    "gelu clamped": replace(ACTIVATIONS["gelu"], limit=0.5),
    "swiglu capped": replace(ACTIVATIONS["swiglu"], gate_cap=1.5, up_cap=0.75),
}
ROUTINGS = (
    "uniform",
    "one expert",
    "one empty",
    "last only",
    "zipf",
    "duplicates",
    "sentinels",
    "all sentinels",
    "ties",
)
LAYOUTS = (
    "contiguous", "strided x", "column-major x", "transposed weights", "interleaved",
    "transposed and interleaved", "sliced weights", "stride-0 gradient",
)  # fmt: skip
FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    **{name: (name,) for name in NAMES},
    "experts": ("w1", "w2", *BIASES),
    "biases": BIASES,
    **{f"all but {name}": tuple(n for n in (*NAMES, *BIASES) if n != name) for name in NAMES},
    "all but biases": NAMES,
    "everything": (*NAMES, *BIASES),
}


@dataclass(frozen=True)
class Case:
    """One call of moe_mlp; `top_k` 0 means E."""

    tokens: int = 33
    experts: int = 4
    top_k: int = 2
    dims: tuple[int, int] = (48, 80)
    routing: str = "uniform"
    layout: str = "contiguous"
    activation: str = "swiglu"
    frozen: str = "nothing"
    dtype: torch.dtype = torch.float32
    tma: bool = True
    bias: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (*NAMES, *BIASES) if self.bias else NAMES

    @property
    def k(self) -> int:
        return min(self.top_k or self.experts, self.experts)

    @property
    def act(self) -> Activation:
        return ACTIVATION_ROWS[self.activation]

    @property
    def asked(self) -> tuple[str, ...]:
        """The inputs that need a gradient."""
        return tuple(name for name in self.names if name not in FROZEN[self.frozen])

    def __str__(self) -> str:
        d, f = self.dims
        dtype = str(self.dtype).removeprefix("torch.")
        words = (self.routing, self.layout, self.activation, f"frozen {self.frozen}", dtype)
        words += ("bias",) * self.bias
        return f"T{self.tokens}-E{self.experts}-K{self.k}-D{d}-F{f}-" + "-".join(words).replace(" ", "_")


@dataclass(frozen=True)
class Inputs:
    """Tensors of a call, weights in the canonical layout [E, G, D] and [E, D, F]."""

    x: Tensor
    ids: Tensor
    weight: Tensor
    w1: Tensor
    w2: Tensor
    dout: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None

    def to(self, device: str) -> Inputs:
        there = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return Inputs(**there)

    def double(self) -> Inputs:
        floats = {
            name: value.double() for name, value in vars(self).items() if name != "ids" and value is not None
        }
        return Inputs(ids=self.ids, **floats)


def expert_ids(kind: str, tokens: int, experts: int, k: int, generator: torch.Generator) -> Tensor:
    """ids_TK of a routing kind; distinct experts in a token wherever the kind lets them be."""
    scores_TE = torch.rand(tokens, experts, generator=generator)
    if kind == "zipf":
        scores_TE = scores_TE.log() * torch.arange(1, experts + 1)
    if kind == "ties":
        scores_TE = (scores_TE * 2).round()
    if kind == "one empty":
        scores_TE[:, experts // 2] = -1
    ids_TK = scores_TE.topk(k, dim=-1).indices
    fixed = {"one expert": experts // 2, "last only": experts - 1, "all sentinels": experts}
    if kind in fixed:
        ids_TK = torch.full_like(ids_TK, fixed[kind])
    if kind == "duplicates":
        ids_TK[:, -1] = ids_TK[:, 0]
    if kind == "sentinels":
        pick_TK = torch.rand(ids_TK.shape, generator=generator)
        ids_TK = torch.where(pick_TK < 0.2, -1, torch.where(pick_TK < 0.4, experts, ids_TK))
        ids_TK = torch.where(pick_TK > 0.9, experts + 3, ids_TK)
    return ids_TK


def build(case: Case) -> Inputs:
    """Inputs of a case, the same every time; pre-activations and experts' outputs are about N(0, 1)."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    (d, f), wide = case.dims, torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dout = normal(case.tokens, d)
    if case.layout == "stride-0 gradient":
        dout = torch.ones((), dtype=torch.float64).expand(case.tokens, d)
    return Inputs(
        x=normal(case.tokens, d).to(case.dtype),
        ids=expert_ids(case.routing, case.tokens, case.experts, case.k, generator),
        weight=(torch.rand(case.tokens, case.k, generator=generator) + 0.1).to(wide),
        w1=(normal(case.experts, case.act.parts * f, d) / d**0.5).to(case.dtype),
        w2=(normal(case.experts, d, f) / f**0.5).to(case.dtype),
        dout=dout.to(case.dtype),
        b1=normal(case.experts, case.act.parts * f).to(case.dtype) if case.bias else None,
        b2=normal(case.experts, d).to(case.dtype) if case.bias else None,
    )


def alternates(case: Case) -> bool:
    """Whether the case stores gate and up rows in turn."""
    return case.act.gated and case.layout in ("interleaved", "transposed and interleaved")


def in_turn(w: Tensor) -> Tensor:
    """[E, 2F, ...] with all gates first -> gate and up in turn."""
    return w.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def gates_first(w: Tensor) -> Tensor:
    """The inverse of `in_turn`."""
    return w.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def stored_weight(w: Tensor, case: Case) -> Weight:
    """`w` [E, out, in] as the case's layout stores it; every float outside of it is NaN."""
    if case.layout in ("transposed weights", "transposed and interleaved"):
        return Weight(guarded(w.transpose(1, 2).contiguous()), transposed=True)
    if case.layout == "sliced weights":
        wider = w.new_full((*w.shape[:2], w.shape[2] + 16), torch.nan)
        wider[..., : w.shape[2]] = w
        return Weight(wider[..., : w.shape[2]])
    return Weight(guarded(w))


def stored_x(x: Tensor, case: Case) -> Tensor:
    tokens, d = x.shape
    if case.layout == "strided x":
        wider = x.new_full((tokens, d + 16), torch.nan)
        wider[:, :d] = x
        return wider[:, :d]
    if case.layout == "column-major x":
        return x.t().contiguous().t()
    return guarded(x)


def run_moe_mlp(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """{"out", "dx", ...} of moe_mlp as the case calls it; weight gradients back in the canonical layout."""
    turned = alternates(case)
    w1 = stored_weight(in_turn(inputs.w1) if turned else inputs.w1, case)
    w2 = stored_weight(inputs.w2, case)
    leaves = {"x": stored_x(inputs.x, case), "weight": guarded(inputs.weight), "w1": w1.w, "w2": w2.w}
    if case.bias:
        leaves |= {"b1": guarded(in_turn(inputs.b1) if turned else inputs.b1), "b2": guarded(inputs.b2)}
    leaves = {name: leaf.detach().requires_grad_(name in case.asked) for name, leaf in leaves.items()}
    w1 = replace(w1, w=leaves["w1"], bias=leaves.get("b1"))
    w2 = replace(w2, w=leaves["w2"], bias=leaves.get("b2"))
    act = replace(case.act, interleaved=turned)
    out = moe_mlp(leaves["x"], inputs.ids, leaves["weight"], w1, w2, activation=act)
    result = {"out": out.detach()}
    if not case.asked:
        assert not out.requires_grad
        return result
    grads = torch.autograd.grad(out, [leaves[name] for name in case.asked], inputs.dout)
    for name, grad in zip(case.asked, grads, strict=True):
        assert grad.dtype == leaves[name].dtype
        canonical = Weight(grad, w1.transposed).out_in if name in ("w1", "w2") else grad
        result["d" + name] = gates_first(canonical) if turned and name in ("w1", "b1") else canonical
    return result


def run_reference(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same by the loop reference, in the dtypes of `inputs`."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name in case.asked) for name in case.names}
    w1, w2 = Weight(leaves["w1"], bias=leaves.get("b1")), Weight(leaves["w2"], bias=leaves.get("b2"))
    out = moe_mlp_reference(leaves["x"], inputs.ids, leaves["weight"], w1, w2, activation=case.act)
    result = {"out": out.detach()}
    if out.requires_grad:
        grads = torch.autograd.grad(out, [leaves[name] for name in case.asked], inputs.dout)
        result |= {"d" + name: grad for name, grad in zip(case.asked, grads, strict=True)}
    return result


def check_case(case: Case, inputs: Inputs | None = None) -> None:
    """moe_mlp by the error rule: the output and every gradient that the case asks for, and no other."""
    inputs = inputs or build(case)
    out = run_moe_mlp(case, inputs)
    eager, ref = run_reference(case, inputs), run_reference(case, inputs.double())
    assert out.keys() == ref.keys() == {"out", *("d" + name for name in case.asked)}
    for name, value in out.items():
        assert_close(value, eager[name], ref[name], case.dtype, name)


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows such that every two levels of every two factors meet in one: greedy, and the same every time."""
    names = list(factors)
    uncovered = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    order = {name: i for i, name in enumerate(names)}
    rng, rows = random.Random(0), []

    def gain(row: dict[str, int], name: str, level: int) -> int:
        pairs = (sorted([(name, level), other], key=lambda p: order[p[0]]) for other in row.items())
        return sum(tuple(pair) in uncovered for pair in pairs)

    while uncovered:
        row = dict(min(uncovered))
        for name in names:
            if name not in row:
                levels = rng.sample(range(len(factors[name])), len(factors[name]))
                row[name] = max(levels, key=lambda level, name=name: gain(row, name, level))
        uncovered -= set(itertools.combinations(((name, row[name]) for name in names), 2))
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def load_benchmark(name: str) -> ModuleType:
    """The module benchmarks/`name`.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
