"""What Inductor does with a `pixelfly::` operator: the lowering of the device its input is on.

A lowering answers None to what it cannot take (dtypes, odd sizes, other devices): then the generated code calls the
operator's reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

# Before any template: Inductor's own import order, another one is circular.
from torch._inductor.lowering import add_needs_realized_inputs, fallback_handler, register_lowering

from pixelfly_compiler.kernels import attention, grouped_ops, ops  # noqa: F401 - register torch.ops.pixelfly

from torch._inductor.lowering import lowerings as L  # isort: skip


_OPERATORS = ("linear", "block_grad", "grouped_linear", "grouped_block_grad", "attention", "attention_backward")
# Imported when they are needed: Triton only when a GPU is compiled for. What a device lacks runs as its reference.
_MODULES = {"cpu": ("lowering_cpu", "lowering_cpu_attention"), "cuda": ("lowering_gpu_linear", "lowering_gpu_grad")}


def _overload(name: str) -> Any:
    return getattr(torch.ops.pixelfly, name).default


def _lower(name: str, x: Any, *args: Any) -> Any:
    """`lower_<name>` of the device of `x`."""
    modules = (import_module(f"{__package__}.{module}") for module in _MODULES.get(x.get_device().type, ()))
    function = next((vars(module)[f"lower_{name}"] for module in modules if f"lower_{name}" in vars(module)), None)
    lowered = function(x, *args) if function else None
    return lowered or _fallback(_overload(name))(x, *args)


def _fallback(op: Any) -> Callable[..., Any]:
    return fallback_handler(op, add_to_fallback_set=False)


def _lowered() -> dict[Any, Callable[..., Any]]:
    return {_overload(name): functools.partial(_lower, name) for name in _OPERATORS}


@functools.cache
def register() -> None:
    """Register the lowerings with Inductor; once per process."""
    for overload, lower in _lowered().items():
        register_lowering(overload, type_promotion_kind=None)(lower)
    if torch.cuda.is_available():
        from pixelfly_compiler.kernels import lowering_gpu_linear

        lowering_gpu_linear.dense_choice()  # code out of a compiler's cache may call it where nothing is lowered
    # As for aten's matmuls: else a bias gradient computes the whole pointwise chain of its input once more.
    add_needs_realized_inputs(list(_lowered()))


@contextmanager
def references_only() -> Iterator[None]:
    """Meanwhile Inductor calls the operators' references: for a graph in which a template failed."""
    before = {operator: L[operator] for operator in _lowered()}
    L.update({operator: _fallback(operator) for operator in _lowered()})
    try:
        yield
    finally:
        L.update(before)
