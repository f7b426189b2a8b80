"""What Inductor does with a `pixelfly::` operator: the lowering of the device its input is on.

A lowering answers None to what it cannot take (dtypes, odd sizes, other devices): then the generated code calls the
operator's reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

# Before any template: Inductor's own import order, another one is circular.
from torch._inductor.lowering import add_needs_realized_inputs, fallback_handler, register_lowering

from pixelfly_compiler.kernels import attention, ops  # noqa: F401 - register torch.ops.pixelfly

from torch._inductor.lowering import lowerings as L  # isort: skip


def _module(device: torch.device) -> ModuleType | None:
    """The lowerings of a device; Triton is imported only when a GPU is compiled for."""
    if device.type == "cpu":
        from pixelfly_compiler.kernels import lowering_cpu

        return lowering_cpu
    if device.type == "cuda":
        from pixelfly_compiler.kernels import lowering_gpu

        return lowering_gpu
    return None


_BY_DEVICE = ("linear", "block_grad", "grouped_linear", "grouped_block_grad")


def _overload(name: str) -> Any:
    return getattr(torch.ops.pixelfly, name).default


def _lower(name: str, x: Any, *args: Any) -> Any:
    """`lower_<name>` of the device. GPUs have none for weights of several matrices yet."""
    function = getattr(_module(x.get_device()), f"lower_{name}", None)
    lowered = function(x, *args) if function else None
    return lowered or _fallback(_overload(name))(x, *args)


def _lower_attention(q: Any, *args: Any) -> Any:
    module = _attention_module(q.get_device())
    lowered = module.lower_attention(q, *args) if module else None
    return lowered or _fallback(torch.ops.pixelfly.attention.default)(q, *args)


def _lower_attention_backward(g: Any, *args: Any) -> Any:
    module = _attention_module(g.get_device())
    lowered = module.lower_attention_backward(g, *args) if module else None
    return lowered or _fallback(torch.ops.pixelfly.attention_backward.default)(g, *args)


def _attention_module(device: torch.device) -> ModuleType | None:
    if device.type != "cpu":
        return None
    from pixelfly_compiler.kernels import lowering_cpu_attention

    return lowering_cpu_attention


def _fallback(op: Any) -> Callable[..., Any]:
    return fallback_handler(op, add_to_fallback_set=False)


def _lowered() -> dict[Any, Callable[..., Any]]:
    return {
        **{_overload(name): functools.partial(_lower, name) for name in _BY_DEVICE},
        torch.ops.pixelfly.attention.default: _lower_attention,
        torch.ops.pixelfly.attention_backward.default: _lower_attention_backward,
    }


@functools.cache
def register() -> None:
    """Register the lowerings with Inductor; once per process."""
    for overload, lower in _lowered().items():
        register_lowering(overload, type_promotion_kind=None)(lower)
    if torch.cuda.is_available():
        from pixelfly_compiler.kernels import lowering_gpu

        lowering_gpu.dense_choice()  # code out of a compiler's cache may call it where nothing is lowered
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
