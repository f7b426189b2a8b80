"""From a dense weight to the nearest compact weight: kept blocks on a support plus a low-rank term u v^T.

**Fixed basis.** With v given, {matrices on the support} + {u v^T : u free} is a linear space, and `project_fixed` is
the orthogonal projection P onto it: linear, P(P(W)) = P(W), its own adjoint. Block row by block row: the support can
take up any error in its own columns, so u is the least-squares fit on the other columns N,

    u = W_N V_N (V_N^T V_N)^+        then        blocks = (W - u v^T) on the support.

**Best basis.** `project_svd` also chooses v. It alternates between support and low rank, for trained weights.

Shapes, throughout: weight (out, in); v (in, r); u (out, r); rows and cols, int64 (nnz,), the block row and block column
of each kept block; blocks (nnz, b, b), zero where they reach over the weight's edge; R = ceil(out / b),
C = ceil(in / b). Arithmetic is done in at least float32, also under autocast, and the results have that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pixelfly_compiler.kernels.support import Support

P = ParamSpec("P")
T = TypeVar("T")

# A direction of v with a smaller share of its squared length outside a block row's kept columns is not used there:
# blocks and u would be huge and cancel each other. The same for all dtypes, so that P is the same map in all of them.
LEAST_OUTSIDE = 1e-3


def block_index(support: Support, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(rows, cols) of the support's kept blocks, each int64 (nnz,)."""
    return torch.from_numpy(support.rows()).to(device), torch.from_numpy(support.cols()).to(device)


def gather_blocks(weight: Tensor, rows: Tensor, cols: Tensor, block: int) -> Tensor:
    """The kept blocks of `weight`, (nnz, b, b); the weight counts as zero beyond its edges."""
    out_features, in_features = weight.shape
    tiles = (
        _pad(weight, -out_features % block, -in_features % block)
        .unflatten(1, (-1, block))
        .unflatten(0, (-1, block))
        .transpose(1, 2)
    )  # (R, C, b, b)
    return tiles[rows, cols]


def scatter_blocks(blocks: Tensor, rows: Tensor, cols: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out, in) weight that has `blocks` on the support and zeros elsewhere: the adjoint of `gather_blocks`."""
    block = blocks.shape[-1]
    block_rows, block_cols = -(-out_features // block), -(-in_features // block)
    zeros = blocks.new_zeros(block_rows, block, block_cols, block)
    tiles = zeros.transpose(1, 2).index_put((rows, cols), blocks)  # (R, C, b, b)
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:out_features, :in_features]


def densify(blocks: Tensor, u: Tensor, v: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The dense weight of a compact one: blocks on the support plus u v^T, (out, in)."""
    return scatter_blocks(blocks, rows, cols, u.shape[0], v.shape[0]) + u @ v.mT.to(u.dtype)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Frobenius norm of the difference over that of `weight`; 0 where both are zero."""
    dtype = _compute_dtype(weight)
    difference = torch.linalg.norm(weight.to(dtype) - approximation.to(dtype)).item()
    return difference / torch.linalg.norm(weight.to(dtype)).item() if difference else 0.0


# ---- fixed basis ----


def fixed_basis(in_features: int, rank: int) -> Tensor:
    """A random (in, rank) float32 matrix with orthonormal columns that depends on its shape only.

    It is the same in every process and on every reload. Treat it as read-only: calls share its memory.
    """
    if not 0 <= rank <= in_features:
        raise ValueError(f"rank must lie in 0..{in_features} for a weight with {in_features} columns, got {rank}")
    return torch.from_numpy(_orthonormal(in_features, rank))


@lru_cache(maxsize=256)
def _orthonormal(rows: int, columns: int) -> NDArray[np.float32]:
    """QR of a normal matrix, with signs made unique. In numpy: the cache must never hold a fake tensor."""
    random = np.random.RandomState([rows, columns])  # numpy promises that this generator's stream never changes
    normal = random.standard_normal((rows, columns))
    q, r = np.linalg.qr(normal)
    return np.ascontiguousarray(q * np.sign(np.diagonal(r)), dtype=np.float32)


def gram_inverse(support: Support, v: Tensor) -> Tensor:
    """(V_N^T V_N)^+ for each block row, where N are the columns outside its kept blocks: (R, r, r), in v's dtype.

    v has orthonormal columns. Directions of v that lie within a block row's kept columns (all of them, where it keeps
    every block) are left to the support: see `LEAST_OUTSIDE`. The projection remains exactly orthogonal.
    """
    v_blocks = _row_blocks(v.double(), support.block)  # (C, b, r)
    block_grams = v_blocks.mT @ v_blocks  # (C, r, r)
    outside = torch.ones(support.block_rows, support.block_cols, dtype=torch.float64, device=v.device)
    outside[block_index(support, v.device)] = 0
    patterns, pattern_of_row = torch.unique(outside, dim=0, return_inverse=True)  # stretched rows share theirs
    grams = torch.tensordot(patterns, block_grams, dims=1)
    return torch.linalg.pinv(grams, atol=LEAST_OUTSIDE, rtol=0.0, hermitian=True).to(v.dtype)[pattern_of_row]


def _without_autocast(function: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """Weights are projected at full precision also where the matmuls around them are not."""

    @wraps(function)
    def wrapper(weight: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.amp.is_autocast_available(weight.device.type):
            return function(weight, *args, **kwargs)
        with torch.autocast(weight.device.type, enabled=False):
            return function(weight, *args, **kwargs)

    return wrapper


@_without_autocast
def project_fixed(
    weight: Tensor, v: Tensor, gram_inv: Tensor, rows: Tensor, cols: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """The orthogonal projection with basis v: (blocks, u); its dense form is `densify(blocks, u, v, rows, cols)`.

    gram_inv, (R, r, r), comes from `gram_inverse`.
    """
    weight = weight.to(_compute_dtype(weight))
    v = v.to(weight.dtype)
    kept = gather_blocks(weight, rows, cols, block)
    u = _fit(weight, kept, v, gram_inv, rows, cols)
    return kept - _lowrank_blocks(u, v, rows, cols, block), u


@_without_autocast
def project_adjoint(g_blocks: Tensor, g_u: Tensor, v: Tensor, gram_inv: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The adjoint of `project_fixed`: the gradient of the weight, (out, in), from those of blocks and u.

    On the support it is g_blocks; elsewhere h v^T with h = (g_u - g_blocks V_S) (V_N^T V_N)^+.
    """
    g_blocks, g_u = g_blocks.to(_compute_dtype(g_blocks)), g_u.to(_compute_dtype(g_u))
    v, block = v.to(g_u.dtype), g_blocks.shape[-1]
    inside = torch.bmm(g_blocks, _row_blocks(v, block)[cols])  # (nnz, b, r)
    outside = _row_blocks(g_u, block).index_add(0, rows, inside, alpha=-1)  # (R, b, r)
    h = torch.bmm(outside, gram_inv.to(g_u.dtype)).flatten(0, 1)  # (R * b, r)
    weight = h @ _row_blocks(v, block).flatten(0, 1).mT  # (R * b, C * b)
    tiles = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
    tiles[rows, cols] = g_blocks
    return weight[: g_u.shape[0], : v.shape[0]]


def _fit(weight: Tensor, kept: Tensor, v: Tensor, gram_inv: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """u = (W V - W_S V_S) (V_N^T V_N)^+, with S the kept columns of each block row and `kept` the blocks there."""
    block = kept.shape[-1]
    inside = torch.bmm(kept, _row_blocks(v, block)[cols])  # (nnz, b, r)
    outside = _row_blocks(weight @ v, block).index_add(0, rows, inside, alpha=-1)  # (R, b, r)
    return torch.bmm(outside, gram_inv.to(weight.dtype)).flatten(0, 1)[: weight.shape[0]]


def _lowrank_blocks(u: Tensor, v: Tensor, rows: Tensor, cols: Tensor, block: int) -> Tensor:
    """u v^T on the support only, (nnz, b, b)."""
    return torch.bmm(_row_blocks(u, block)[rows], _row_blocks(v, block)[cols].mT)


def _row_blocks(matrix: Tensor, block: int) -> Tensor:
    """The rows of `matrix` in blocks, padded with zeros: (ceil(rows / b), b, columns)."""
    return _pad(matrix, -matrix.shape[0] % block, 0).unflatten(0, (-1, block))


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """`matrix` with zero rows and columns appended; F.pad would copy also where there are none."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def matrices_of(dense: Tensor, blocks: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A weight's matrix and its parts, or those of each matrix of several."""
    if dense.dim() == 2:
        return iter([(dense, blocks, u)])
    return zip(dense.unbind(), blocks.unbind(), u.unbind(), strict=True)


def project_each(weight: Tensor, project: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`project` of a weight (out, in), or of each matrix of (n, out, in), and the results stacked."""
    if weight.dim() == 2:
        return project(weight)
    return tuple(torch.stack(parts) for parts in zip(*map(project, weight), strict=True))


# ---- best basis ----


@torch.no_grad()
@_without_autocast
def project_svd(weight: Tensor, support: Support, rank: int, iters: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """A compact weight close to `weight`, with a basis of its own: (blocks, u, v), v with orthonormal columns.

    Alternates between the support (exact, given the low-rank term) and the low-rank term (one warm-started step of
    subspace iteration towards the truncated SVD of what the support leaves), as in Hastie et al., "Matrix completion
    and low-rank SVD via fast alternating least squares", JMLR 2015. It starts at the fixed basis, and no step raises
    the error but by rounding, where the rank is more than the support leaves. The better of start and end is returned,
    so it is never worse than `project_fixed`. Not differentiable. NaN and inf come out as NaN.
    """
    weight = weight.to(_compute_dtype(weight))
    rows, cols = block_index(support, weight.device)
    v = fixed_basis(weight.shape[1], rank).to(weight)
    blocks, u = project_fixed(weight, v, gram_inverse(support, v), rows, cols, support.block)
    if rank == 0 or not weight.isfinite().all():
        return blocks, u, v  # nothing to improve, or nothing that a factorisation could take
    start = blocks, u, v
    kept = gather_blocks(weight, rows, cols, support.block)
    for _ in range(iters):
        remainder = weight - scatter_blocks(blocks, rows, cols, *weight.shape)
        v = torch.linalg.qr(remainder.mT @ (remainder @ v)).Q  # least squares for v, given u = remainder @ v
        u = remainder @ v
        blocks = kept - _lowrank_blocks(u, v, rows, cols, support.block)
    blocks, u = project_fixed(weight, v, gram_inverse(support, v), rows, cols, support.block)

    def error(compact: tuple[Tensor, Tensor, Tensor]) -> float:
        return relative_error(weight, densify(*compact, rows, cols))

    return min((blocks, u, v), start, key=error)
