"""The operator `pixelfly::attention`: exact softmax attention, where the library's own is slow on the CPU at hand.

    attention(q, k, v, mask, causal, scale)                      o = softmax(scale q k^T + mask) v, and lse
    attention_backward(g, q, k, v, o, lse, mask, causal, scale)  the gradients of q, k and v

PyTorch's attention on the CPU multiplies through MKL, which off Intel's processors runs fp32 at half of oneDNN's rate
and emulates bf16. Ours is the same algorithm (FlashAttention: tiles of scores, running maximum and sum, fp32 inside),
multiplied by the micro-kernel of our matmuls. Nothing is approximated. The eager implementation is `reference`.

Source: Dao, "FlashAttention-2", 2023, arXiv 2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pixelfly_compiler.kernels import cpus, reference
from pixelfly_compiler.kernels.ops import register_autocast


@torch.library.custom_op("pixelfly::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q k^T + mask) v and lse, the logarithm of each softmax's sum.

    Shapes: q (B, H, M, D), k and v (B, H, N, D), o as q, with the heads next to D in memory, and lse (B, H, M), fp32.
    mask: (B or 1, H or 1, M or 1, N), bool (True takes part) or what is added to the scores. `causal`: query i sees the
    keys up to i. A query that sees no key gives zeros.
    """
    return reference.attention(q, k, v, mask, causal, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:-1], dtype=reference.compute_dtype(q.dtype))


@torch.library.custom_op("pixelfly::attention_backward", mutates_args=())
def _attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v for the gradient g of o."""
    return reference.attention_backward(g, q, k, v, o, lse, mask, causal, scale)


@_attention_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _like(x: Tensor) -> Tensor:
    """Empty (B, H, M, D), laid out as (B, M, H, D)."""
    batch, heads, rows, features = x.shape
    return x.new_empty(batch, rows, heads, features).transpose(1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, mask = ctx.saved_tensors
    grads = torch.ops.pixelfly.attention_backward(g, q, k, v, o, lse, mask, ctx.causal, ctx.scale)
    return *grads, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)
register_autocast("attention", "cpu", low_precision=True)


@cache
def is_faster_here(backward: bool) -> bool:
    """Is this a CPU on which our attention beats PyTorch's, or at least does so where gradients are asked for?

    With AVX-512 and bf16 pairs it does in both, but for Intel's CPUs: there PyTorch's forward is as good. Forward and
    backward took it 1.5 to 5 times as long as ours on the matrix unit in bf16, 1.0 to 1.8 times in fp32.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not cpus.multiplies_pairs():
        return False
    return not cpus.is_intel() or (backward and cpus.has_matrix_unit())
