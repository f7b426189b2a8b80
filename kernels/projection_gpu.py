"""P and its adjoint as Triton kernels: what `projection` does in a dozen tensor operations each, in three or four.

    P         outside = W_N V_N               u = outside (V_N^T V_N)^+    blocks = (W - u v^T) on the support
    adjoint   outside = g_u - g_blocks V_S    h = outside (V_N^T V_N)^+    g_blocks on the support, else h v^T

The products with the pseudo-inverses are a library's. The notation is that of `projection`. Every sum has one order, so
that results repeat bit by bit. Rows beyond the weight's edge are computed as zeros, up to whole blocks.

A weight of E matrices takes as many launches as one of one. What is outside of the support, u and h lie by block rows,
(R, E, BLOCK, RANK), since a pseudo-inverse belongs to a block row.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelfly_compiler.kernels.gpus import gpu_of
from pixelfly_compiler.kernels.heuristics_gpu import ProjectionLaunch, projection_launch
from pixelfly_compiler.kernels.ops import DTYPES, support_index
from pixelfly_compiler.kernels.support import Support

if TYPE_CHECKING:
    from pixelfly_compiler.kernels.projector import Projector

log = logging.getLogger(__name__)

_failures: list[Exception] = []

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _times_v(  # type: ignore[no-untyped-def]
    SOURCE,  # W (E, out, in), or g_blocks (E, nnz, BLOCK, BLOCK) if ADJOINT
    V,  # (in, RANK)
    G_U,  # (E, out, RANK) if ADJOINT
    OUTSIDE,  # (R, E, BLOCK, RANK) float32
    CROW,  # the blocks that are met, by rows: those outside of the support, or those on it if ADJOINT
    COL,
    out_features,
    in_features,
    stride,  # of SOURCE, from matrix to matrix
    stride_out,
    stride_in,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    matrix = tl.program_id(2).to(tl.int64)
    SOURCE += matrix * stride
    block_row = tl.program_id(0) * BLOCK_M // BLOCK
    first = tl.load(CROW + block_row)
    end = tl.load(CROW + block_row + 1)
    PARTS: tl.constexpr = BLOCK // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(0, (end - first) * PARTS):
        place = first + step // PARTS
        inside = (step % PARTS) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = tl.load(COL + place) * BLOCK + inside
        if ADJOINT:
            at = place.to(tl.int64) * (BLOCK * BLOCK) + (rows % BLOCK)[:, None] * BLOCK + inside[None, :]
            w = tl.load(SOURCE + at)
        else:
            at = _places(rows, k, stride_out, stride_in)
            w = tl.load(SOURCE + at, mask=_both(rows < out_features, k < in_features), other=0.0)
        at = k[:, None] * RANK + r[None, :]
        v = tl.load(V + at, mask=_both(k < in_features, r < RANK), other=0.0)
        acc = tl.dot(w.to(tl.float32), v, acc, input_precision=PRECISION)
    if ADJOINT:
        at = (matrix * out_features + rows)[:, None] * RANK + r[None, :]
        g_u = tl.load(G_U + at, mask=_both(rows < out_features, r < RANK), other=0.0)
        acc = g_u.to(tl.float32) - acc
    at = _by_block_rows(rows, matrix, tl.num_programs(2), BLOCK)[:, None] * RANK + r[None, :]
    tl.store(OUTSIDE + at, acc, mask=(r < RANK)[None, :])


@triton.jit
def _kept_blocks(  # type: ignore[no-untyped-def]
    W,  # (E, out, in)
    U,  # (R, E, BLOCK, RANK) float32
    V,  # (in, RANK)
    BLOCKS,  # (E, nnz, BLOCK, BLOCK)
    ROW,  # of each kept block
    COL,
    out_features,
    in_features,
    stride,
    stride_out,
    stride_in,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0)
    matrix = tl.program_id(2).to(tl.int64)
    inside = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    across = tl.arange(0, BLOCK)
    rows = tl.load(ROW + slot) * BLOCK + inside
    k = tl.load(COL + slot) * BLOCK + across
    at = _places(rows, k, stride_out, stride_in)
    w = tl.load(W + matrix * stride + at, mask=_both(rows < out_features, k < in_features), other=0.0)
    rows = _by_block_rows(rows, matrix, tl.num_programs(2), BLOCK)
    kept = w.to(tl.float32) - _lowrank(U, V, rows, k, in_features, RANK, BLOCK_M, BLOCK, BLOCK_R, PRECISION)
    at = (matrix * tl.num_programs(0) + slot) * (BLOCK * BLOCK) + inside[:, None] * BLOCK + across[None, :]
    tl.store(BLOCKS + at, kept.to(BLOCKS.dtype.element_ty))


@triton.jit
def _dense(  # type: ignore[no-untyped-def]
    GRADIENT,  # (E, out, in)
    H,  # (R, E, BLOCK, RANK) float32
    V,  # (in, RANK)
    G_BLOCKS,  # (E, nnz, BLOCK, BLOCK)
    SLOT,  # (R, C) the place of each block among the kept ones, or -1
    out_features,
    in_features,
    nnz,
    stride,
    stride_out,
    stride_in,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    across = tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + across
    matrix = tl.program_id(2).to(tl.int64)
    slot = tl.load(SLOT + (tl.program_id(0) * BLOCK_M // BLOCK) * tl.num_programs(1) + tl.program_id(1))
    if slot >= 0:
        at = (matrix * nnz + slot) * (BLOCK * BLOCK) + (rows % BLOCK)[:, None] * BLOCK + across[None, :]
        tile = tl.load(G_BLOCKS + at).to(tl.float32)
    else:
        of_h = _by_block_rows(rows, matrix, tl.num_programs(2), BLOCK)
        tile = _lowrank(H, V, of_h, k, in_features, RANK, BLOCK_M, BLOCK, BLOCK_R, PRECISION)
    at = matrix * stride + _places(rows, k, stride_out, stride_in)
    mask = _both(rows < out_features, k < in_features)
    tl.store(GRADIENT + at, tile.to(GRADIENT.dtype.element_ty), mask=mask)


@triton.jit
def _places(rows, k, stride_out, stride_in):  # type: ignore[no-untyped-def]
    """Where these rows and columns of the dense weight are stored."""
    return rows.to(tl.int64)[:, None] * stride_out + k.to(tl.int64)[None, :] * stride_in


@triton.jit
def _by_block_rows(rows, matrix, matrices, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rows of one matrix are in (R, E, BLOCK)."""
    return rows + (rows // BLOCK * (matrices - 1) + matrix) * BLOCK


@triton.jit
def _both(down, across):  # type: ignore[no-untyped-def]
    """The mask of a tile from those of its rows and columns."""
    return down[:, None] & across[None, :]


@triton.jit
def _lowrank(  # type: ignore[no-untyped-def]
    U,
    V,
    rows,
    k,
    in_features,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u v^T at these rows and columns: (BLOCK_M, BLOCK)."""
    acc = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
    for r0 in range(0, RANK, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        u = tl.load(U + rows[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
        at = k[None, :] * RANK + r[:, None]
        v = tl.load(V + at, mask=_both(r < RANK, k < in_features), other=0.0)
        acc = tl.dot(u, v, acc, input_precision=PRECISION)
    return acc


# --------------------------------------------------------------------------------------------------------------- calls


def applies(projector: Projector, weight: Tensor, part: torch.dtype) -> bool:
    """Can it project this weight to blocks and u of dtype `part`?"""
    rank, block = projector.v.shape[1], projector.support.block
    fits = weight.dtype in DTYPES and part in DTYPES and rank > 0 and projector.support.nnz > 0
    return fits and block >= 16 and block & (block - 1) == 0 and not _failures


def project(projector: Projector, weight: Tensor, blocks: Tensor, u: Tensor) -> bool:
    """Write P of the weight to blocks and u; False where the kernels cannot be compiled: then none is tried again."""
    try:
        with torch.cuda.device_of(weight), torch.autocast(weight.device.type, enabled=False):
            _project(projector, weight, blocks, u)
    except Exception as cause:
        return _give_up(cause)
    return True


def adjoint(projector: Projector, gradient: Tensor, g_blocks: Tensor, g_u: Tensor) -> bool:
    """Write the weight's gradient; False likewise."""
    try:
        with torch.cuda.device_of(gradient), torch.autocast(gradient.device.type, enabled=False):
            _adjoint(projector, gradient, g_blocks, g_u)
    except Exception as cause:
        return _give_up(cause)
    return True


def _give_up(cause: Exception) -> bool:
    _failures.append(cause)
    log.warning("pixelfly: the projection runs without its Triton kernels, more slowly: %s", cause)
    return False


def _project(projector: Projector, weight: Tensor, blocks: Tensor, u: Tensor) -> None:
    support, v = projector.support, projector.v
    launch = _launch(projector, weight)
    outside = _outside(projector, weight, None, _elsewhere(support, v.device), weight, launch)
    full = torch.bmm(outside.flatten(1, 2), projector.gram_inv).view_as(outside)
    u.copy_(full.transpose(0, 1).flatten(1, 2)[:, : support.out_features].view_as(u))
    _, col, row = _kept(support, v.device)
    matrices, *sides, stride = _sizes(weight)
    _kept_blocks[(support.nnz, support.block // launch.block_m, matrices)](
        weight, full, v, blocks, row, col, *sides, stride, *weight.stride()[-2:], **_constants(projector, launch)
    )


def _adjoint(projector: Projector, gradient: Tensor, g_blocks: Tensor, g_u: Tensor) -> None:
    support, v = projector.support, projector.v
    launch = _launch(projector, gradient)
    crow, col, _ = _kept(support, v.device)
    outside = _outside(projector, g_blocks, g_u, (crow, col), gradient, launch)
    h = torch.bmm(outside.flatten(1, 2), projector.gram_inv)
    slots = _slots(support, v.device)
    matrices, *sides, stride = _sizes(gradient)
    strides = (stride, *gradient.stride()[-2:])
    _dense[(support.block_rows * (support.block // launch.block_m), support.block_cols, matrices)](
        gradient, h, v, g_blocks, slots, *sides, support.nnz, *strides, **_constants(projector, launch)
    )


def _sizes(weight: Tensor) -> tuple[int, int, int, int]:
    """The number of matrices, their out and in, and the stride from one to the next."""
    matrices, stride = (weight.shape[0], weight.stride(0)) if weight.dim() == 3 else (1, 0)
    return matrices, weight.shape[-2], weight.shape[-1], stride


def _outside(
    projector: Projector,
    source: Tensor,
    g_u: Tensor | None,
    met: tuple[Tensor, Tensor],
    dense: Tensor,
    launch: ProjectionLaunch,
) -> Tensor:
    """(R, E, BLOCK, RANK): what `_times_v` makes of the source and the blocks that are met."""
    support, (_, rank) = projector.support, projector.v.shape
    matrices, *sides, stride = _sizes(dense)
    outside = projector.v.new_empty(support.block_rows, matrices, support.block, rank)
    grid = (support.block_rows * (support.block // launch.rows), triton.cdiv(rank, launch.block_r), matrices)
    constants = _constants(projector, launch) | {"BLOCK_M": launch.rows, "BLOCK_K": launch.block_k}
    _times_v[grid](
        source,
        projector.v,
        projector.v if g_u is None else g_u,
        outside,
        *met,
        *sides,
        stride if g_u is None else support.nnz * support.block**2,
        *dense.stride()[-2:],
        ADJOINT=g_u is not None,
        **constants,
    )
    return outside


def _launch(projector: Projector, weight: Tensor) -> ProjectionLaunch:
    return projection_launch(projector.support.block, projector.v.shape[1], gpu_of(weight.device))


def _constants(projector: Projector, launch: ProjectionLaunch) -> dict[str, Any]:
    return {
        "RANK": projector.v.shape[1],
        "BLOCK": projector.support.block,
        "BLOCK_M": launch.block_m,
        "BLOCK_R": launch.block_r,
        "PRECISION": launch.precision,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _kept(support: Support, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """crow (R + 1), col and row (nnz) of the kept blocks, as int32."""
    sizes = (support.block_rows + 1, support.nnz, support.nnz)
    index = support_index(support, device)
    crow, col, row = index[: sum(sizes)].split(sizes)
    return crow, col, row


@lru_cache(maxsize=512)
def _elsewhere(support: Support, device: torch.device) -> tuple[Tensor, Tensor]:
    """crow (R + 1) and col of the blocks that are not kept, as int32."""
    slots = _slots(support, torch.device("cpu")).numpy()
    crow = np.concatenate([[0], np.cumsum((slots < 0).sum(1))])
    col = np.nonzero(slots < 0)[1]
    first, second = (torch.from_numpy(part.astype(np.int32)).to(device) for part in (crow, col))
    return first, second


@lru_cache(maxsize=512)
def _slots(support: Support, device: torch.device) -> Tensor:
    """(R, C) int32: the place of each block among the kept ones, or -1."""
    slots = np.full((support.block_rows, support.block_cols), -1, dtype=np.int32)
    slots[support.rows(), support.cols()] = np.arange(support.nnz)
    return torch.from_numpy(slots).to(device)
