"""Which attention backend a model trains with."""

from __future__ import annotations

from typing import Any

SDPA = (
    "PyTorch's sdpa: flash for whole sequences; a mask (padding, packing) takes its memory-efficient kernel"
)
ON_CPU = "PyTorch's sdpa"


def choose(model: Any, where: str) -> tuple[str, bool, str]:
    """(name, whether it is not eager, what and why) of the attention of `model`, switched from eager to sdpa
    where its class has it.

    What was asked for otherwise (flash-attn, flex) stays. A class without sdpa has reasons of its own, such
    as sinks, and stays eager.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if config._attn_implementation == "eager" and model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    found = config._attn_implementation
    if found == "sdpa":
        return name, True, SDPA if where == "cuda" else ON_CPU
    if found == "eager":
        return name, False, "eager: the class has no sdpa"
    return name, True, f"{found}, as loaded"
