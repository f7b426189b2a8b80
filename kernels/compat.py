"""What differs between the versions of torch and Triton that the GPU side runs on: torch 2.11 and newer."""

from __future__ import annotations

from typing import Any

from torch._inductor.virtualized import V


def size_hint(expression: Any, fallback: int) -> int:
    """The likely value of a symbolic size; the method was renamed in torch 2.12."""
    sizes: Any = V.graph.sizevars
    ask = getattr(sizes, "optimization_hint", None) or sizes.size_hint
    return int(ask(expression, fallback=fallback))
