"""The `pixelfly::` operators: contract, shapes, autograd and autocast. Torch only; no compiler, no plan, no budget.

A compact weight is W = scatter(blocks) + u v^T, of shape (out, in):

    blocks (nnz, b_out, b_in)   the kept blocks in CSR order, zero where the last row or column reaches over the edge
    u (out, r), v (in, r)       the low-rank factors, or None for both
    index                       where the blocks stand: `support_index(support)`, or None if every block is kept

    linear(x, blocks, u, v, index, features, transposed, bias)   y = x W^T + bias (W if transposed), and t = x v
    block_grad(a, x, t, index, b_out, b_in)                      the kept blocks of a^T x, and a^T t
    densify(blocks, u, v, index, out, in)                        W itself, for what is not a matmul

All are closed under differentiation. The eager implementation is `reference`; the fast ones are lowerings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixelfly_compiler.kernels import reference
from pixelfly_compiler.kernels.reference import SupportIndex
from pixelfly_compiler.kernels.support import Support

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels exist in


@functools.lru_cache(maxsize=1024)
def _support_index(support: Support, device: torch.device) -> Tensor:
    from torch._dynamo import mark_static

    index = SupportIndex.pack(support).to(device)
    # A constant: else Dynamo, once it has seen a support of another size, makes the number of blocks symbolic.
    mark_static(index)
    return index


def support_index(support: Support, device: torch.device | str = "cpu") -> Tensor:
    """The support as one int32 tensor (see `reference.SupportIndex`), shared by all weights of that support."""
    return _support_index(support, torch.device(device))


# ------------------------------------------------------------------------------------------------------------- linear


@torch.library.custom_op("pixelfly::linear", mutates_args=())
def _linear(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    index: Tensor | None,
    features: int,
    transposed: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias (x W + bias if transposed), and t = x v.

    Shapes: x (..., K), y (..., features), u (features, r), v (K, r), bias (features,). `transposed` concerns the blocks
    only; u and v are given in the operator's own orientation: u meets y, v meets x. t (..., r) is returned because the
    gradient of u needs it; without low rank it is (..., 0).
    """
    return reference.linear(x, blocks, u, v, index, features, transposed, bias)


@_linear.register_fake
def _(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    index: Tensor | None,
    features: int,
    transposed: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_dtypes("linear", x, blocks=blocks, u=u, v=v, bias=bias)
    rank = 0 if v is None else v.shape[1]
    return x.new_empty(*x.shape[:-1], features), x.new_empty(*x.shape[:-1], rank)


def check_dtypes(operator: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise unless x and the others, by name, are of one type."""
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            raise RuntimeError(f"pixelfly::{operator}: x is {x.dtype} but {name} is {other.dtype}; cast one of them")


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, blocks, u, v, index, _, transposed, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.transposed = transposed
    ctx.save_for_backward(x, blocks, u, v, index, output[1] if u is not None else None)


def _linear_backward(ctx: Any, gy: Tensor | None, gt: Tensor | None) -> tuple[Tensor | None, ...]:
    x, blocks, u, v, index, t = ctx.saved_tensors
    need_x, need_blocks, need_u, need_v = ctx.needs_input_grad[:4]
    gx = gblocks = gu = gv = gbias = None
    if gy is not None:
        if any(ctx.needs_input_grad[7:]):  # the last one; not there where a call leaves it out
            gbias = rows_of(gy).sum(0)
        # s = gy u, the gradient of t, comes with the input gradient: the transposed operator's own t.
        s = None
        if need_x:
            gx, s = torch.ops.pixelfly.linear(gy, blocks, v, u, index, x.shape[-1], not ctx.transposed)
        elif need_v:
            s = gy @ u
        if need_blocks:
            a, b = (x, gy) if ctx.transposed else (gy, x)
            # gu comes with it, unless gy is on the other side.
            beside = rows_of(t) if need_u and not ctx.transposed else None
            gblocks, with_blocks = torch.ops.pixelfly.block_grad(
                rows_of(a), rows_of(b), beside, index, *blocks.shape[1:]
            )
            gu = None if beside is None else with_blocks
        if need_u and gu is None:
            gu = tall_product(gy, t)
        if need_v and s is not None:
            gv = tall_product(x, s)
    if gt is not None and v is not None:
        gx = add(gx, gt @ v.mT) if need_x else None
        gv = add(gv, tall_product(x, gt)) if need_v else None
    return gx, gblocks, gu, gv, None, None, None, gbias


def rows_of(x: Tensor) -> Tensor:
    """x (..., features) as (rows, features)."""
    # Counted: what PyTorch divides for -1 loses a factor in the backward of a branch of symbolic sizes.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def add(a: Tensor | None, b: Tensor) -> Tensor:
    """The sum of the parts of a gradient, of which the first may be missing."""
    return b if a is None else a + b


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@_linear.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """x may have any number of dimensions, so that one more is no matter; of several weights each is used by itself."""
    op = torch.ops.pixelfly.linear
    x_dim, *others = in_dims
    if x_dim is not None and all(dim is None for dim in others):
        return op(args[0].movedim(x_dim, 0), *args[1:]), (0, 0)
    return one_by_one(op, info, in_dims, args), (0, 0)


def one_by_one(
    op: Callable[..., tuple[Tensor, Tensor]], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """An operator under vmap, called for each of the mapped arguments, and its results stacked."""
    pairs = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    ys, ts = zip(*pairs, strict=True)
    return torch.stack(ys), torch.stack(ts)


def linear(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    support: Support,
    *,
    gamma: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias for x (..., in), with W = scatter(blocks) + u v^T.

    With gamma, the paper's learnable scalar (section 3.3), W = gamma * scatter(blocks) + (1 - gamma) u v^T: being a
    scalar it folds into the compact weight.
    """
    if gamma is not None:
        blocks = gamma * blocks
        u = None if u is None else (1 - gamma) * u
    index = support_index(support, x.device)
    y, _ = torch.ops.pixelfly.linear(x, blocks, u, v, index, support.out_features, False, bias)
    return y


# --------------------------------------------------------------------------------------------------------- block_grad


@torch.library.custom_op("pixelfly::block_grad", mutates_args=())
def _block_grad(
    a: Tensor, x: Tensor, t: Tensor | None, index: Tensor | None, b_out: int, b_in: int
) -> tuple[Tensor, Tensor]:
    """The gradients of blocks and u, for a (M, out), x (M, in) and t (M, r).

    They are the kept blocks of a^T x, (nnz, b_out, b_in), zero beyond the weight's edge, and a^T t, (out, r); without
    t (out, 0).
    """
    return reference.block_grad(a, x, t, index, b_out, b_in)


@_block_grad.register_fake
def _(a: Tensor, x: Tensor, t: Tensor | None, index: Tensor | None, b_out: int, b_in: int) -> tuple[Tensor, Tensor]:
    shape = SupportIndex.shape_of(index, a.shape[1], x.shape[1], b_out, b_in)
    return x.new_empty(shape.nnz, b_out, b_in), a.new_empty(a.shape[1], 0 if t is None else t.shape[1])


def _block_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])


def _block_grad_backward(ctx: Any, g: Tensor | None, gu: Tensor | None) -> tuple[Tensor | None, ...]:
    a, x, t, index = ctx.saved_tensors
    need_a, need_x, need_t = ctx.needs_input_grad[:3]
    ga = gx = gt = None
    if g is not None:
        g = g.contiguous()
        if need_a:
            ga = torch.ops.pixelfly.linear(x, g, None, None, index, a.shape[1], False)[0]
        if need_x:
            gx = torch.ops.pixelfly.linear(a, g, None, None, index, x.shape[1], True)[0]
    if gu is not None and t is not None:
        ga = add(ga, t @ gu.mT) if need_a else None
        gt = a @ gu if need_t else None
    return ga, gx, gt, None, None, None


_block_grad.register_autograd(_block_grad_backward, setup_context=_block_grad_setup)


def tall_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a (..., n) and b (..., r) with r small: (n, r), as a block gradient whose blocks are all kept."""
    a, b = rows_of(a), rows_of(b)
    rows = 64 if a.shape[1] >= 64 else 16
    blocks, _ = torch.ops.pixelfly.block_grad(a, b, None, None, rows, b.shape[1])
    return blocks.reshape(-1, b.shape[1])[: a.shape[1]]


# ------------------------------------------------------------------------------------------------------------ densify


def _densify(
    blocks: Tensor, u: Tensor | None, v: Tensor | None, index: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """W = scatter(blocks) + u v^T, (out_features, in_features), with square blocks.

    Composed of PyTorch's own operators, which all of autograd and torch.func go through: eager models run it too.
    """
    return reference.densify(blocks, u, v, index, out_features, in_features)


torch.library.define(
    "pixelfly::densify",
    torch.library.infer_schema(_densify, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    torch.library.impl("pixelfly::densify", _key)(_densify)


# ----------------------------------------------------------------------------------------------------------- autocast


def register_autocast(name: str, device_type: str, low_precision: bool) -> None:
    """Under autocast the operator runs in the autocast dtype, as F.linear does, or else in its inputs' dtype."""
    op: Callable[..., Any] = getattr(torch.ops.pixelfly, name).default
    key = f"Autocast{device_type.upper()}"

    def cast(arg: Any) -> Any:
        if low_precision and isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
            return arg.to(torch.get_autocast_dtype(device_type))
        return arg

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return op(*map(cast, args))

    _autocast.impl(name, kernel, key)


_autocast = torch.library.Library("pixelfly", "IMPL")
for _device_type in ("cpu", "cuda"):
    register_autocast("linear", _device_type, low_precision=True)
    register_autocast("densify", _device_type, low_precision=False)
