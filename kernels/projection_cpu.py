"""P and its adjoint as C++ on CPU: what `projection` does in a dozen tensor operations, in one pass over the weight.

Compiled once per pair of dtypes through Inductor's C++ cache. Where it cannot be compiled or does not
apply, `Projector` falls back to `projection`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from pixelfly_compiler.kernels import projection
from pixelfly_compiler.kernels.ops import support_index
from pixelfly_compiler.kernels.support import Support

log = logging.getLogger(__name__)

_C_TYPES = {torch.float32: "float", torch.bfloat16: "at::BFloat16", torch.float16: "at::Half"}


class _Problem(ctypes.Structure):
    """`Problem` of the C++: sizes, strides, and where the arrays lie."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("block", "rank", "out", "in", "stride_out", "stride_in")),
        *((name, ctypes.c_void_p) for name in ("crow", "col", "v", "v_t", "gram_inv")),
    )


@lru_cache(maxsize=16)
def _library(dense: torch.dtype, part: torch.dtype) -> Any | None:
    """The compiled functions `project` and `adjoint`; None where this machine cannot compile them."""
    try:
        return _compiling(dense, part)()
    except Exception as cause:  # a missing or failing compiler: any error is one
        log.warning("pixelfly: the projection runs without its C++ kernel, more slowly: %s", cause)
        return None


@lru_cache(maxsize=16)
def _compiling(dense: torch.dtype, part: torch.dtype) -> Callable[[], Any]:
    """Begin to compile the library, beside what Inductor compiles; the result waits for it."""
    from torch._inductor.async_compile import AsyncCompile  # heavy to import, and only needed here
    from torch._inductor.codecache import CppCodeCache

    source = (Path(__file__).parent / "templates" / "project.cpp.jinja").read_text()
    code = jinja2.Template(source).render(dense=_C_TYPES[dense], part=_C_TYPES[part])
    try:
        result: Callable[[], Any] = CppCodeCache.load_async(code, submit_fn=AsyncCompile.submit)
    except Exception as cause:
        failed: Future[Any] = Future()
        failed.set_exception(cause)
        return failed.result
    return result


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
    def _padded_v(self) -> tuple[Tensor, Tensor]:
        """v with zero rows up to a whole block, and its transpose."""
        padding = -self.support.in_features % self.support.block
        v = torch.nn.functional.pad(self.v, (0, 0, 0, padding))
        return v.contiguous(), v.t().contiguous()

    def project(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(blocks, u) in `dtype` of a dense weight, (out, in) or several (n, out, in), computed in at least fp32."""
        block, count = self.support.block, weight.shape[:-2]
        blocks = torch.empty(*count, self.support.nnz, block, block, dtype=dtype, device=weight.device)
        u = torch.empty(*count, self.support.out_features, self.v.shape[1], dtype=dtype, device=weight.device)
        for parts in zip(_each(weight, 2), _each(blocks, 3), _each(u, 2), strict=True):
            self._project(*parts)
        return blocks, u

    def _project(self, weight: Tensor, blocks: Tensor, u: Tensor) -> None:
        library = self._native(weight, blocks.dtype)
        if library is not None:
            self._run(library.project, weight, blocks, u)
            return
        rows, cols = self._index
        made = projection.project_fixed(weight, self.v, self.gram_inv, rows, cols, self.support.block)
        blocks.copy_(made[0])
        u.copy_(made[1])

    def adjoint(self, g_blocks: Tensor, g_u: Tensor, like: Tensor) -> Tensor:
        """The gradient of the weight, with shape, dtype and strides of `like`, from those of (blocks, u)."""
        gradient = torch.empty_like(like)
        g_blocks, g_u = g_blocks.contiguous(), g_u.contiguous()
        for parts in zip(_each(gradient, 2), _each(g_blocks, 3), _each(g_u, 2), strict=True):
            self._adjoint(*parts)
        return gradient

    def _adjoint(self, gradient: Tensor, g_blocks: Tensor, g_u: Tensor) -> None:
        library = self._native(gradient, g_blocks.dtype) if g_blocks.dtype == g_u.dtype else None
        if library is not None:
            self._run(library.adjoint, gradient, g_blocks, g_u)
            return
        gradient.copy_(projection.project_adjoint(g_blocks, g_u, self.v, self.gram_inv, *self._index))

    def prepare(self, weight: Tensor, part: torch.dtype) -> None:
        """Begin to compile what will project this weight, if that is C++."""
        if self._is_native(weight, part):
            _compiling(weight.dtype, part)

    def _native(self, weight: Tensor, part: torch.dtype) -> Any | None:
        return _library(weight.dtype, part) if self._is_native(weight, part) else None

    def _is_native(self, weight: Tensor, part: torch.dtype) -> bool:
        rank = self.v.shape[1]
        fits = weight.dtype in _C_TYPES and part in _C_TYPES and 1 in weight.stride() and weight.device.type == "cpu"
        return fits and rank > 0 and rank % 16 == 0 and self.support.block % 16 == 0

    def _run(self, function: Any, dense: Tensor, blocks: Tensor, u: Tensor) -> None:
        index = support_index(self.support, dense.device)
        col = index[self.support.block_rows + 1 :]
        arrays = (index, col, *self._padded_v, self.gram_inv)
        sizes = (self.support.block, self.v.shape[1], self.support.out_features, self.support.in_features)
        problem = _Problem(*sizes, *dense.stride(), *(array.data_ptr() for array in arrays))
        operands = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (dense, blocks, u))
        function(ctypes.byref(problem), *operands, ctypes.c_int(torch.get_num_threads()))


def _each(parts: Tensor, dims: int) -> tuple[Tensor, ...]:
    """The part of a weight, with so many dimensions, or those of each matrix of several."""
    return parts.unbind() if parts.dim() > dims else (parts,)
