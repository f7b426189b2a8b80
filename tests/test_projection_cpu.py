"""P and its adjoint in C++ against the plain PyTorch ones: dtypes, tails, weights stored either way."""

from __future__ import annotations

import pytest
import torch
from numerics import error

from pixelfly_compiler.kernels import projection, projection_cpu
from pixelfly_compiler.kernels.projector import Projector
from pixelfly_compiler.kernels.support import Support, dense_support, flat_butterfly

UNEVEN = Support(100, 150, 32, crow=(0, 4, 4, 5, 7), col=(0, 1, 3, 4, 2, 0, 4))
CPU = torch.device("cpu")


@pytest.mark.parametrize("support", [flat_butterfly(128, 192, 32, 1), UNEVEN, dense_support(64, 64, 32)])
@pytest.mark.parametrize("rank", [16, 0])
@pytest.mark.parametrize("stored_in_out", [False, True])
@pytest.mark.parametrize(
    ("dense", "part"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_native_equals_plain(
    support: Support, rank: int, stored_in_out: bool, dense: torch.dtype, part: torch.dtype
) -> None:
    projector = Projector.of(support, rank, CPU)
    weight = torch.randn(support.out_features, support.in_features).to(dense)
    weight = weight.t().contiguous().t() if stored_in_out else weight
    assert projector.native(weight, part) is projection_cpu
    rows, cols = projection.block_index(support)
    tolerance = 4 * torch.finfo(part).eps

    blocks, u = projector.project(weight, part)
    plain = projection.project_fixed(weight.double(), projector.v, projector.gram_inv, rows, cols, support.block)
    assert error(blocks, plain[0]) < tolerance
    assert u.shape == plain[1].shape and (not rank or error(u, plain[1]) < tolerance)

    g_blocks = projection.gather_blocks(torch.randn(weight.shape), rows, cols, support.block).to(part)
    g_u = torch.randn(support.out_features, rank).to(part)
    gradient = projector.adjoint(g_blocks, g_u, weight)
    exact = projection.project_adjoint(g_blocks.double(), g_u.double(), projector.v, projector.gram_inv, rows, cols)
    assert gradient.stride() == weight.stride() and gradient.dtype == dense
    assert error(gradient, exact) < 4 * max(torch.finfo(dense).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float64, 16), (torch.float32, 5)])
def test_what_has_no_kernel_runs_the_plain_version(dtype: torch.dtype, rank: int) -> None:
    projector = Projector.of(flat_butterfly(64, 96, 16, 1), rank, CPU)
    weight = torch.randn(64, 96, dtype=dtype)
    assert projector.native(weight, dtype) is None
    blocks, u = projector.project(weight, dtype)
    assert projector.adjoint(blocks, u, weight).shape == weight.shape


def forget() -> None:
    projection_cpu._library.cache_clear()
    projection_cpu._compiling.cache_clear()


def test_without_a_compiler_the_plain_version_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(CppCodeCache, "load_async", broken)
    forget()
    projector, weight = Projector.of(flat_butterfly(64, 96, 16, 1), 16, CPU), torch.randn(64, 96)
    projector.prepare(weight, torch.float32)
    blocks, u = projector.project(weight, torch.float32)
    assert blocks.isfinite().all() and u.isfinite().all()
    assert "no compiler here" in caplog.text
    forget()


def test_one_thread_waits_for_no_lock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache, config

    built: list[object] = []

    class Recorded(codecache.CppBuilder):
        def build(self) -> None:
            built.append(self)

    monkeypatch.setattr(codecache, "CppBuilder", Recorded)
    monkeypatch.setattr(codecache.CppCodeCache, "cache", {})
    monkeypatch.setattr(codecache, "LOCK_TIMEOUT", 0.1)
    forget()
    projector, weight = Projector.of(flat_butterfly(64, 96, 16, 1), 16, CPU), torch.randn(64, 96).half()
    with config.patch(compile_threads=1):
        projector.prepare(weight, torch.bfloat16)  # of types that no other test compiles
        blocks, _ = projector.project(weight, torch.bfloat16)
    assert built and blocks.isfinite().all()
    forget()
