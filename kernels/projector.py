"""P for all weights of one support, by the kernels of the device they are on: C++, Triton, or else plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from pixelfly_compiler.kernels import projection, projection_cpu
from pixelfly_compiler.kernels.gpus import why_no_kernels
from pixelfly_compiler.kernels.projection import matrices_of
from pixelfly_compiler.kernels.support import Support


@dataclass(frozen=True)
class Projector:
    """P for all weights of one support and rank: the fixed basis v (in, r) and what belongs to it."""

    support: Support
    v: Tensor
    gram_inv: Tensor

    @staticmethod
    @lru_cache(maxsize=512)
    def of(support: Support, rank: int, device: torch.device) -> Projector:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            v = projection.fixed_basis(support.in_features, rank)
            return Projector(support, v.to(device), projection.gram_inverse(support, v).to(device))

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        return projection.block_index(self.support, self.v.device)

    @cached_property
    def padded_v(self) -> tuple[Tensor, Tensor]:
        """v with zero rows up to a whole block, and its transpose."""
        padding = -self.support.in_features % self.support.block
        v = torch.nn.functional.pad(self.v, (0, 0, 0, padding))
        return v.contiguous(), v.t().contiguous()

    def project(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(blocks, u) in `dtype` of a dense weight, (out, in) or several (n, out, in), computed in at least fp32."""
        block, count = self.support.block, weight.shape[:-2]
        blocks = torch.empty(*count, self.support.nnz, block, block, dtype=dtype, device=weight.device)
        u = torch.empty(*count, self.support.out_features, self.v.shape[1], dtype=dtype, device=weight.device)
        native = self.native(weight, dtype)
        if native is None or not native.project(self, weight, blocks, u):
            rows, cols = self._index
            for one, its_blocks, its_u in matrices_of(weight, blocks, u):
                made = projection.project_fixed(one, self.v, self.gram_inv, rows, cols, block)
                its_blocks.copy_(made[0])
                its_u.copy_(made[1])
        return blocks, u

    def adjoint(self, g_blocks: Tensor, g_u: Tensor, like: Tensor) -> Tensor:
        """The gradient of the weight, with shape, dtype and strides of `like`, from those of (blocks, u)."""
        gradient = torch.empty_like(like)
        g_blocks, g_u = g_blocks.contiguous(), g_u.contiguous()
        native = self.native(gradient, g_blocks.dtype) if g_blocks.dtype == g_u.dtype else None
        if native is None or not native.adjoint(self, gradient, g_blocks, g_u):
            for one, its_blocks, its_u in matrices_of(gradient, g_blocks, g_u):
                one.copy_(projection.project_adjoint(its_blocks, its_u, self.v, self.gram_inv, *self._index))
        return gradient

    def prepare(self, weight: Tensor, part: torch.dtype) -> None:
        """Begin to compile what will project this weight, if that is C++."""
        if self.native(weight, part) is projection_cpu:
            projection_cpu.prepare(weight.dtype, part)

    def native(self, weight: Tensor, part: torch.dtype) -> ModuleType | None:
        """The module whose kernels project such a weight, if one does."""
        if weight.is_cuda and why_no_kernels(weight.device) is None:
            from pixelfly_compiler.kernels import projection_gpu  # imports Triton

            return projection_gpu if projection_gpu.applies(self, weight, part) else None
        return projection_cpu if weight.is_cpu and projection_cpu.applies(self, weight, part) else None
