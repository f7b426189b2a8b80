"""The `pixelfly::` operators for a weight of several matrices, such as the experts of a mixture: contract and autograd.

A compact weight of E matrices (out, in) shares support and index (see `ops`), and has a leading dimension:

    blocks (E, nnz, b, b), u (E, out, r), v (in, r)     u or v may be shared, without the leading dimension
    ends (E,), int32                                    where the rows of each matrix end; None: as many rows for each

    grouped_linear(x, blocks, u, v, ends, index, features, transposed)    y and t as of `linear`, group by group
    grouped_block_grad(a, x, t, ends, index, groups, b_out, b_in)         of each: the kept blocks of a^T x, and a^T t

Rows lie group by group; those behind the last end give zeros. Both are closed under differentiation. Autocast leaves
them alone, as it does `torch.nn.functional.grouped_mm`: they run in the type of their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixelfly_compiler.kernels import reference
from pixelfly_compiler.kernels.ops import add, check_dtypes, one_by_one, rows_of
from pixelfly_compiler.kernels.reference import SupportIndex


@torch.library.custom_op("pixelfly::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    ends: Tensor | None,
    index: Tensor | None,
    features: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """y = x W_e^T (x W_e if transposed), x (..., K), y (..., features), for the rows of group e; t = x v_e (..., r)."""
    return reference.grouped_linear(x, blocks, u, v, ends, index, features, transposed)


@_grouped_linear.register_fake
def _(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    ends: Tensor | None,
    index: Tensor | None,
    features: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    check_dtypes("grouped_linear", x, blocks=blocks, u=u, v=v)
    rank = 0 if v is None else v.shape[-1]
    return x.new_empty(*x.shape[:-1], features), x.new_empty(*x.shape[:-1], rank)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, blocks, u, v, ends, index, _, transposed = inputs
    ctx.set_materialize_grads(False)
    ctx.transposed = transposed
    ctx.save_for_backward(x, blocks, u, v, ends, index, output[1] if u is not None else None)


def _linear_backward(ctx: Any, gy: Tensor | None, gt: Tensor | None) -> tuple[Tensor | None, ...]:
    x, blocks, u, v, ends, index, t = ctx.saved_tensors
    need_x, need_blocks, need_u, need_v = ctx.needs_input_grad[:4]
    gx = gblocks = gu = gv = None
    groups = blocks.shape[0]
    if gy is not None:
        s = None
        if need_x or need_v:
            gx, s = torch.ops.pixelfly.grouped_linear(gy, blocks, v, u, ends, index, x.shape[-1], not ctx.transposed)
        if need_blocks:
            a, b = (x, gy) if ctx.transposed else (gy, x)
            beside = rows_of(t) if need_u and u.dim() == 3 and not ctx.transposed else None
            gblocks, with_blocks = torch.ops.pixelfly.grouped_block_grad(
                rows_of(a), rows_of(b), beside, ends, index, groups, *blocks.shape[2:]
            )
            gu = None if beside is None else with_blocks
        if need_u and gu is None:
            gu = _factor_grad(gy, t, u, ends, groups)
        if need_v and s is not None:
            gv = _factor_grad(x, s, v, ends, groups)
    if gt is not None and v is not None:
        if need_x:
            gx = add(gx, _times(gt, v.mT, ends, groups))
        if need_v:
            gv = add(gv, _factor_grad(x, gt, v, ends, groups))
    return gx if need_x else None, gblocks, gu, gv, None, None, None, None


def _times(x: Tensor, matrices: Tensor, ends: Tensor | None, groups: int) -> Tensor:
    """x times a matrix of its group (E, k, n), or of all (k, n)."""
    kept = (matrices if matrices.dim() == 3 else matrices.expand(groups, -1, -1)).mT.contiguous()
    return torch.ops.pixelfly.grouped_linear(x, kept[:, None], None, None, ends, None, kept.shape[1], False)[0]


def _factor_grad(a: Tensor, b: Tensor, factor: Tensor, ends: Tensor | None, groups: int) -> Tensor:
    """a^T b of each group, for a factor of its own (E, n, r), or of all rows (n, r)."""
    a, b = rows_of(a), rows_of(b)
    rows = 64 if a.shape[1] >= 64 else 16
    blocks, _ = torch.ops.pixelfly.grouped_block_grad(a, b, None, ends, None, groups, rows, b.shape[1])
    each = blocks.reshape(groups, -1, b.shape[1])[:, : a.shape[1]]
    return each if factor.dim() == 3 else each.sum(0)


_grouped_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@_grouped_linear.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Where all matrices meet as many rows, those of all examples lie side by side."""
    op = torch.ops.pixelfly.grouped_linear
    (x, blocks, u, v, ends, *rest), (x_dim, *others) = args, in_dims
    if x_dim is None or ends is not None or any(dim is not None for dim in others):
        return one_by_one(op, info, in_dims, args), (0, 0)
    *lead, k = x.movedim(x_dim, 0).shape
    by_matrix = x.movedim(x_dim, 0).reshape(info.batch_size, blocks.shape[0], -1, k).transpose(0, 1)
    y, t = op(by_matrix, blocks, u, v, None, *rest)
    y, t = (part.transpose(0, 1).reshape(*lead, part.shape[-1]) for part in (y, t))
    return (y, t), (0, 0)


@torch.library.custom_op("pixelfly::grouped_block_grad", mutates_args=())
def _grouped_block_grad(
    a: Tensor,
    x: Tensor,
    t: Tensor | None,
    ends: Tensor | None,
    index: Tensor | None,
    groups: int,
    b_out: int,
    b_in: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of blocks (E, nnz, b_out, b_in) and u (E, out, r), for a (M, out), x (M, in) and t (M, r)."""
    return reference.grouped_block_grad(a, x, t, ends, index, groups, b_out, b_in)


@_grouped_block_grad.register_fake
def _(
    a: Tensor,
    x: Tensor,
    t: Tensor | None,
    ends: Tensor | None,
    index: Tensor | None,
    groups: int,
    b_out: int,
    b_in: int,
) -> tuple[Tensor, Tensor]:
    shape = SupportIndex.shape_of(index, a.shape[1], x.shape[1], b_out, b_in)
    rank = 0 if t is None else t.shape[1]
    return x.new_empty(groups, shape.nnz, b_out, b_in), a.new_empty(groups, a.shape[1], rank)


def _block_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.groups = inputs[5]
    ctx.save_for_backward(*inputs[:5])


def _block_grad_backward(ctx: Any, g: Tensor | None, gu: Tensor | None) -> tuple[Tensor | None, ...]:
    a, x, t, ends, index = ctx.saved_tensors
    need_a, need_x, need_t = ctx.needs_input_grad[:3]
    ga = gx = gt = None
    linear = torch.ops.pixelfly.grouped_linear
    if g is not None:
        g = g.contiguous()
        ga = linear(x, g, None, None, ends, index, a.shape[1], False)[0] if need_a else None
        gx = linear(a, g, None, None, ends, index, x.shape[1], True)[0] if need_x else None
    if gu is not None and t is not None:
        ga = add(ga, _times(t, gu.mT, ends, ctx.groups)) if need_a else None
        gt = _times(a, gu, ends, ctx.groups) if need_t else None
    return ga, gx, gt, None, None, None, None, None


_grouped_block_grad.register_autograd(_block_grad_backward, setup_context=_block_grad_setup)
