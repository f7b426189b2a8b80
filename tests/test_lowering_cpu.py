"""The C++ templates, compiled and run: every dtype, odd sizes, any support, fused epilogues, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as, to_double
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import run_and_get_code

from pixelfly_compiler.kernels import lowering, lowering_cpu, ops
from pixelfly_compiler.kernels.cpus import has_matrix_unit
from pixelfly_compiler.kernels.support import Support, flat_butterfly

UNEVEN = Support(100, 150, 32, crow=(0, 4, 4, 5, 7), col=(0, 1, 3, 4, 2, 0, 4))  # an empty row, tails on both sides
SQUARE = flat_butterfly(150, 150, 32, 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    lowering.register()
    # Inductor's graph cache knows nothing of our sources; the backend tells it, these tests go around the backend.
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def operands(support: Support, rows: int, rank: int, dtype: torch.dtype, transposed: bool) -> list[Any]:
    """x, blocks, u, v, index in the operator's own orientation."""
    out_features, in_features = support.out_features, support.in_features
    k, n = (out_features, in_features) if transposed else (in_features, out_features)
    blocks = torch.randn(support.nnz, support.block, support.block, dtype=dtype)
    u, v = (torch.randn(n, rank).to(dtype), (torch.randn(k, rank) / k**0.5).to(dtype)) if rank else (None, None)
    return [torch.randn(rows, k).to(dtype), blocks, u, v, ops.support_index(support)]


def check(function: Any, args: list[Any], kernels: int, dynamic: bool | None = False) -> str:
    """Compiled is as near to float64 as eager, with `kernels` of our templates or more; returns the code."""
    compiled, code = run_and_get_code(torch.compile(function, dynamic=dynamic, fullgraph=True), *args)
    eager, exact = function(*args), function(*map(to_double, args))
    for ours, plain, truth in zip(compiled, eager, exact, strict=True):
        assert_as_good_as(ours, plain, truth)
    text = "\n".join(code)
    assert text.count("async_compile.cpp_pybinding") >= kernels and "torch.ops.pixelfly" not in text
    return text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_and_gradients_at_odd_sizes(dtype: torch.dtype, transposed: bool) -> None:
    features = UNEVEN.in_features if transposed else UNEVEN.out_features
    x, blocks, u, v, index = operands(UNEVEN, 77, 48 if transposed else 16, dtype, transposed)
    bias = torch.randn(features).to(dtype)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, t = torch.ops.pixelfly.linear(x, blocks, u, v, index, features, transposed, bias)
        plain = torch.ops.pixelfly.linear(x, blocks, None, None, index, features, transposed)[0]
        return y, t, plain

    check(function, [x, blocks, u, v, index, bias], kernels=2)
    # The gradients take y as computed, so their error adds to its own: compare on the same y.
    y, t = torch.ops.pixelfly.linear(x, blocks, u, v, index, features, transposed)
    pair = (x, y) if transposed else (y, x)

    def gradients(a: Tensor, b: Tensor, y: Tensor, t: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        plain = torch.ops.pixelfly.block_grad(a, b, None, index, 32, 32)[0]
        return *torch.ops.pixelfly.block_grad(a, b, t, index, 32, 32), plain, ops.tall_product(y, t)

    check(gradients, [*pair, y, t, index], kernels=3)


@pytest.mark.parametrize("rows", [7, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_avx2(dtype: torch.dtype, rows: int) -> None:
    x, blocks, u, v, index = operands(UNEVEN, rows, 16, dtype, False)
    bias = torch.randn(UNEVEN.out_features).to(dtype)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor, square: Tensor) -> tuple[Tensor, ...]:
        grads = torch.ops.pixelfly.block_grad(x, x, x[:, :48], square, 32, 32)
        return torch.ops.pixelfly.linear(x, blocks, u, v, index, UNEVEN.out_features, False, bias)[0], *grads

    with inductor_config.patch({"cpp.simdlen": 256}):
        assert pick_vec_isa().bit_width() == 256
        check(function, [x, blocks, u, v, index, ops.support_index(SQUARE)], kernels=2)


@pytest.mark.parametrize(("block", "rank", "rows"), [(32, 48, 77), (16, 16, 50), (64, 64, 33)])
@pytest.mark.parametrize(
    "unit", [pytest.param(True, marks=pytest.mark.skipif(not has_matrix_unit(), reason="there is none")), False]
)
def test_bf16_with_and_without_the_matrix_unit(
    unit: bool, block: int, rank: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering_cpu, "has_matrix_unit", lambda: unit)
    x, blocks, u, v, index = operands(flat_butterfly(150, 200, block, 1), rows, rank, torch.bfloat16, transposed=False)
    y = torch.randn(rows, 150).bfloat16()

    def function(x: Tensor, y: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        forward = torch.ops.pixelfly.linear(x, blocks, u, v, index, 150, False)
        backward = torch.ops.pixelfly.linear(y, blocks, v, u, index, 200, True)
        return *forward, *backward, *torch.ops.pixelfly.block_grad(y, x, x[:, :rank], index, block, block)

    assert ("MatrixUnit" in check(function, [x, y, blocks, u, v, index], kernels=3)) == unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "rank"), [(1, 32), (7, 48), (20, 16)])
def test_few_rows_take_the_dot_product_path(dtype: torch.dtype, rows: int, rank: int) -> None:
    args = [*operands(UNEVEN, rows, rank, dtype, False), torch.randn(UNEVEN.out_features).to(dtype)]
    code = check(lambda *a: torch.ops.pixelfly.linear(*a[:5], UNEVEN.out_features, False, a[5]), args, kernels=1)
    assert "dot_rows" in code


@pytest.mark.parametrize("rows", [7, 50])
def test_t_is_stored_only_where_it_is_read(rows: int) -> None:
    args = operands(UNEVEN, rows, 16, torch.float32, False)
    code = check(lambda *a: torch.ops.pixelfly.linear(*a, UNEVEN.out_features, False)[:1], args, kernels=1)
    assert "t_out" not in code
    read = check(lambda *a: torch.ops.pixelfly.linear(*a, UNEVEN.out_features, False), args, kernels=1)
    assert "t_out" in read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_epilogues_are_fused_into_the_template(dtype: torch.dtype) -> None:
    support = flat_butterfly(256, 192, 64, 1)
    x, blocks, _, _, index = operands(support, 130, 0, dtype, False)
    scale, residual = torch.randn(256).to(dtype), torch.randn(2, 65, 256).to(dtype)

    def function(x: Tensor, blocks: Tensor, index: Tensor, scale: Tensor, residual: Tensor) -> tuple[Tensor]:
        y = torch.ops.pixelfly.linear(x.view(2, 65, 192), blocks, None, None, index, 256, False)[0]
        return (F.gelu(y * scale) + residual,)

    code = check(function, [x, blocks, index, scale, residual], kernels=1)
    assert code.count("async_compile.cpp_pybinding") == 1, "scale, GELU and residual run in a kernel of their own"
    rounds = "rounded_to_bf16(tmp" in code
    assert rounds == (dtype == torch.bfloat16), "Inductor's text has changed: see _round_natively"


def test_an_output_with_other_users_is_stored_too() -> None:
    support = flat_butterfly(64, 64, 32, 0)
    x, blocks, _, _, index = operands(support, 50, 0, torch.float32, False)

    def function(x: Tensor, blocks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.pixelfly.linear(x, blocks, None, None, index, 64, False)[0]
        return y, y.relu() + 1

    check(function, [x, blocks, index], kernels=1)


def test_symbolic_rows_compile_once() -> None:
    support = flat_butterfly(96, 64, 32, 0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return torch.ops.pixelfly.linear(x, blocks, u, v, index, 96, False)[0]

    compiled = torch.compile(function, backend=counter, dynamic=None)
    for rows in (100, 33, 5, 32, 480):
        args = operands(support, rows, 32, torch.float32, False)
        torch._dynamo.mark_dynamic(args[0], 0)
        assert_as_good_as(compiled(*args), function(*args), function(*map(to_double, args)))
    assert counter.frame_count == 1


def test_strided_and_repeated_inputs() -> None:
    wide = torch.randn(70, 160)

    def function(wide: Tensor, index: Tensor) -> tuple[Tensor]:
        x = wide[:, 32:96]  # columns of a wider buffer: read in place, at an offset
        return (torch.ops.pixelfly.block_grad(x, x, None, index, 32, 32)[0],)

    check(function, [wide, ops.support_index(flat_butterfly(64, 64, 32, 0))], kernels=1)


def test_other_dtypes_run_the_reference() -> None:
    args = [to_double(arg) for arg in operands(UNEVEN, 9, 16, torch.float32, False)]
    y = torch.compile(lambda *a: torch.ops.pixelfly.linear(*a, 100, False)[0])(*args)
    torch.testing.assert_close(y, torch.ops.pixelfly.linear(*args, 100, False)[0])
