"""The operators in plain PyTorch: what the fast implementations are tested against, and what runs where they cannot.

Nothing here is fast: the blocks are scattered into a dense weight. Low precision is computed in fp32, rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixelfly_compiler.kernels.support import Support


@dataclass(frozen=True)
class SupportIndex:
    """The layout of a support's index, one int32 tensor of six parts one behind the other:

    crow (block_rows + 1), col (nnz), row (nnz)            the blocks by rows: CSR, and the row of each
    crow_t (block_cols + 1), col_t (nnz), slot_t (nnz)     the transposed support, and the CSR place of its blocks
    """

    block_rows: int
    block_cols: int
    nnz: int

    @staticmethod
    def pack(support: Support) -> Tensor:
        """The index of a support."""
        transposed = support.transpose()
        parts = (support.crow, support.col, support.rows(), transposed.crow, transposed.col, support.transpose_order())
        return torch.from_numpy(np.concatenate([np.asarray(part, np.int32) for part in parts]))

    @staticmethod
    def shape_of(index: Tensor | None, out_features: int, in_features: int, b_out: int, b_in: int) -> SupportIndex:
        """The index's shape, from its length; without an index every block is kept."""
        return SupportIndex.of_length(None if index is None else index.shape[0], out_features, in_features, b_out, b_in)

    @staticmethod
    def of_length(length: int | None, out_features: int, in_features: int, b_out: int, b_in: int) -> SupportIndex:
        rows, cols = math.ceil(out_features / b_out), math.ceil(in_features / b_in)
        return SupportIndex(rows, cols, rows * cols if length is None else (length - rows - cols - 2) // 4)

    @staticmethod
    def coordinates(
        index: Tensor | None, out_features: int, in_features: int, b_out: int, b_in: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Block row and block column of each kept block, (nnz,) each, int64."""
        shape = SupportIndex.shape_of(index, out_features, in_features, b_out, b_in or b_out)
        if index is None:
            every = torch.arange(shape.nnz)
            return every // shape.block_cols, every % shape.block_cols
        _, col, row = index[: shape.block_rows + 1 + 2 * shape.nnz].split([shape.block_rows + 1, shape.nnz, shape.nnz])
        return row.long(), col.long()


def scatter(blocks: Tensor, index: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """The dense weight (out, in) of blocks (nnz, b_out, b_in)."""
    _, b_out, b_in = blocks.shape
    shape = SupportIndex.shape_of(index, out_features, in_features, b_out, b_in)
    row, col = (i.to(blocks.device) for i in SupportIndex.coordinates(index, out_features, in_features, b_out, b_in))
    tiles = blocks.new_zeros(shape.block_rows, shape.block_cols, b_out, b_in)
    tiles = tiles.index_put((row, col), blocks)
    weight = tiles.transpose(1, 2).reshape(shape.block_rows * b_out, shape.block_cols * b_in)
    return weight[:out_features, :in_features]


def densify(
    blocks: Tensor, u: Tensor | None, v: Tensor | None, index: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """See `ops.densify`."""
    dtype = compute_dtype(blocks.dtype)
    weight = scatter(blocks.to(dtype), index, out_features, in_features)
    if u is not None and v is not None:
        weight = torch.addmm(weight, u.to(dtype), v.to(dtype).mT)
    return weight.to(blocks.dtype).contiguous()


def linear(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    index: Tensor | None,
    features: int,
    transposed: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ops.linear`."""
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    out_features, in_features = (x.shape[-1], features) if transposed else (features, x.shape[-1])
    weight = scatter(blocks.to(dtype), index, out_features, in_features)
    y = wide @ (weight if transposed else weight.mT)
    if bias is not None:
        y = y + bias.to(dtype)
    if u is None or v is None:
        return y.to(x.dtype), x.new_empty(*x.shape[:-1], 0)
    t = wide @ v.to(dtype)
    return (y + t @ u.to(dtype).mT).to(x.dtype), t.to(x.dtype)


def block_grad(
    a: Tensor, x: Tensor, t: Tensor | None, index: Tensor | None, b_out: int, b_in: int
) -> tuple[Tensor, Tensor]:
    """See `ops.block_grad`."""
    dtype = compute_dtype(x.dtype)
    shape = SupportIndex.shape_of(index, a.shape[1], x.shape[1], b_out, b_in)
    row, col = (i.to(x.device) for i in SupportIndex.coordinates(index, a.shape[1], x.shape[1], b_out, b_in))
    wide = a.to(dtype).mT
    product = x.new_zeros(shape.block_rows * b_out, shape.block_cols * b_in, dtype=dtype)
    product[: a.shape[1], : x.shape[1]] = wide @ x.to(dtype)
    tiles = product.view(shape.block_rows, b_out, shape.block_cols, b_in).transpose(1, 2)
    gu = a.new_empty(a.shape[1], 0) if t is None else (wide @ t.to(dtype)).to(a.dtype)
    return tiles[row, col].to(x.dtype), gu


def grouped_linear(
    x: Tensor,
    blocks: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    ends: Tensor | None,
    index: Tensor | None,
    features: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """See `grouped_ops`."""
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_zeros(rows.shape[0], features)
    t = x.new_zeros(rows.shape[0], 0 if v is None else v.shape[-1])
    for group, (begin, end) in enumerate(_bounds(ends, rows.shape[0], blocks.shape[0])):
        own_u, own_v = (f[group] if f is not None and f.dim() == 3 else f for f in (u, v))
        y[begin:end], t[begin:end] = linear(rows[begin:end], blocks[group], own_u, own_v, index, features, transposed)
    return y.view(*x.shape[:-1], features), t.view(*x.shape[:-1], t.shape[1])


def grouped_block_grad(
    a: Tensor,
    x: Tensor,
    t: Tensor | None,
    ends: Tensor | None,
    index: Tensor | None,
    groups: int,
    b_out: int,
    b_in: int,
) -> tuple[Tensor, Tensor]:
    """See `grouped_ops`."""
    parts = [
        block_grad(a[begin:end], x[begin:end], None if t is None else t[begin:end], index, b_out, b_in)
        for begin, end in _bounds(ends, a.shape[0], groups)
    ]
    blocks, gu = zip(*parts, strict=True)
    return torch.stack(blocks), torch.stack(gu)


def _bounds(ends: Tensor | None, rows: int, groups: int) -> list[tuple[int, int]]:
    """Where the rows of each group begin and end; without `ends` all groups are of equal size."""
    if ends is None and rows % groups:
        raise RuntimeError(f"{rows} rows are no {groups} groups of equal size; give `ends`")
    last = [rows // groups * (group + 1) for group in range(groups)] if ends is None else ends.tolist()
    bounds = list(zip([0, *last[:-1]], last, strict=True))
    if any(begin > end for begin, end in bounds) or last[-1] > rows:
        raise RuntimeError(f"the ends of {groups} groups must ascend and be at most {rows}, got {last}")
    return bounds


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.attention`."""
    scores = _scores(q, k, mask, causal, scale)
    lse = torch.logsumexp(scores, -1)
    o = _softmax(scores) @ v.to(scores.dtype)
    return o.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
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
    """See `attention.attention_backward`."""
    dtype = compute_dtype(q.dtype)
    g = g.to(dtype)
    weights = _softmax(_scores(q, k, mask, causal, scale))
    towards_weights = g @ v.to(dtype).mT - (g * o.to(dtype)).sum(-1, keepdim=True)
    towards_scores = scale * weights * towards_weights
    grads = (towards_scores @ k.to(dtype), towards_scores.mT @ q.to(dtype), weights.mT @ g)
    gq, gk, gv = (grad.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)
    return gq, gk, gv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    dtype = compute_dtype(q.dtype)
    scores = scale * q.to(dtype) @ k.to(dtype).mT
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), -math.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)


def _softmax(scores: Tensor) -> Tensor:
    """Zero in the rows in which nothing takes part. Not exp(scores - lse): where a mask adds -1e9 to a whole row, the
    logarithm of the sum is lost in the rounding of lse.
    """
    return torch.softmax(scores, -1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
