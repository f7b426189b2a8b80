"""P and its adjoint as C++ on CPU: what `projection` does in a dozen tensor operations, in one pass over the weight.

Compiled once per pair of dtypes through Inductor's C++ cache. `projector` calls it where it applies.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from torch import Tensor

from pixelfly_compiler.kernels.ops import support_index
from pixelfly_compiler.kernels.projection import matrices_of

if TYPE_CHECKING:
    from pixelfly_compiler.kernels.projector import Projector

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
    """Begin to compile the library, beside what Inductor compiles; the result waits for it, or, with one thread,
    compiles it: `submit` would do so at once, under a lock that `load_async` holds meanwhile.
    """
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads  # heavy to import, and only needed here
    from torch._inductor.codecache import CppCodeCache

    source = (Path(__file__).parent / "templates" / "project.cpp.jinja").read_text()
    code = jinja2.Template(source).render(dense=_C_TYPES[dense], part=_C_TYPES[part])
    submit = AsyncCompile.submit if get_compile_threads() > 1 else None
    try:
        result: Callable[[], Any] = CppCodeCache.load_async(code, submit_fn=submit)
    except Exception as cause:
        failed: Future[Any] = Future()
        failed.set_exception(cause)
        return failed.result
    return result


def applies(projector: Projector, weight: Tensor, part: torch.dtype) -> bool:
    """Can it project this weight to blocks and u of dtype `part`?"""
    rank = projector.v.shape[1]
    fits = weight.dtype in _C_TYPES and part in _C_TYPES and 1 in weight.stride()[-2:]
    return fits and rank % 16 == 0 and projector.support.block % 16 == 0


def prepare(dense: torch.dtype, part: torch.dtype) -> None:
    """Begin to compile what will project."""
    _compiling(dense, part)


def project(projector: Projector, weight: Tensor, blocks: Tensor, u: Tensor) -> bool:
    """Write P of the weight to blocks and u; False, and nothing is written, where there is no compiler."""
    library = _library(weight.dtype, blocks.dtype)
    return library is not None and _run(library.project, projector, weight, blocks, u)


def adjoint(projector: Projector, gradient: Tensor, g_blocks: Tensor, g_u: Tensor) -> bool:
    """Write the weight's gradient; False likewise."""
    library = _library(gradient.dtype, g_blocks.dtype)
    return library is not None and _run(library.adjoint, projector, gradient, g_blocks, g_u)


def _run(function: Any, projector: Projector, dense: Tensor, blocks: Tensor, u: Tensor) -> bool:
    support = projector.support
    index = support_index(support, dense.device)
    arrays = (index, index[support.block_rows + 1 :], *projector.padded_v, projector.gram_inv)
    sizes = (support.block, projector.v.shape[1], support.out_features, support.in_features)
    problem = _Problem(*sizes, *dense.stride()[-2:], *(array.data_ptr() for array in arrays))
    for parts in matrices_of(dense, blocks, u):
        operands = (ctypes.c_void_p(tensor.data_ptr()) for tensor in parts)
        function(ctypes.byref(problem), *operands, ctypes.c_int(torch.get_num_threads()))
    return True
