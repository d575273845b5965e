"""fastexperts: fused, provably right mixture-of-experts training for Hugging Face models.

    import fastexperts

    fastexperts.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="fastexperts")

Importing needs PyTorch alone: transformers is imported by `register`, `enable` and `optimize`, PEFT by
`lora_config`, Triton and Liger by the first GPU call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastexperts.activations import ACTIVATIONS, Activation
from fastexperts.errors import FastexpertsError
from fastexperts.ops import moe_mlp
from fastexperts.reference import moe_mlp_reference
from fastexperts.routing import Routing
from fastexperts.weights import Lora, Weight

if TYPE_CHECKING:
    from fastexperts.hf.experts import enable, register
    from fastexperts.hf.lora import lora_config
    from fastexperts.hf.optimize import optimize

__version__ = "0.1.0"
__all__ = [
    "ACTIVATIONS",
    "Activation",
    "FastexpertsError",
    "Lora",
    "Routing",
    "Weight",
    "__version__",
    "enable",
    "lora_config",
    "moe_mlp",
    "moe_mlp_reference",
    "optimize",
    "register",
]

_LAZY = {
    "enable": "fastexperts.hf.experts",
    "lora_config": "fastexperts.hf.lora",
    "optimize": "fastexperts.hf.optimize",
    "register": "fastexperts.hf.experts",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastexperts' has no attribute {name!r}")
