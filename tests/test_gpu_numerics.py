"""The generated GPU kernels, run under Triton's interpreter: every template, dtype, odd sizes, any support, epilogues.

Triton reads TRITON_INTERPRET when it is imported, so the tests run in a process of their own, which the first starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as, error, to_double
from torch import Tensor

from pixelfly_compiler.kernels import ops, projection
from pixelfly_compiler.kernels.gpus import KNOWN
from pixelfly_compiler.kernels.projector import Projector
from pixelfly_compiler.kernels.support import Support, flat_butterfly

pytest.importorskip("triton", reason="GPU code needs triton: pip install triton (Linux)")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_under_the_interpreter")

UNEVEN = Support(100, 150, 32, crow=(0, 4, 4, 5, 7), col=(0, 1, 3, 4, 2, 0, 4))  # an empty row, tails on both sides
ALIGNED = Support(104, 152, 32, crow=(0, 4, 4, 5, 7), col=(0, 1, 3, 4, 2, 0, 4))  # rows of multiples of 16 bytes
TARGET = "cuda:90"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def operands(support: Support, rows: int, rank: int, dtype: torch.dtype, transposed: bool) -> list[Any]:
    """x, blocks, u, v, index in the operator's own orientation; blocks are zero beyond the weight's edge."""
    out_features, in_features = support.out_features, support.in_features
    k, n = (out_features, in_features) if transposed else (in_features, out_features)
    blocks = torch.randn(support.nnz, support.block, support.block, dtype=dtype)
    u, v = (torch.randn(n, rank).to(dtype), (torch.randn(k, rank) / k**0.5).to(dtype)) if rank else (None, None)
    return [torch.randn(rows, k).to(dtype), blocks, u, v, ops.support_index(support)]


def check(function: Any, args: list[Any], kernels: int, dynamic: bool | None = False, other: Any = None) -> Any:
    """The code: as near to float64 as eager, with `kernels` of our templates. It runs at `other` sizes too."""
    from emitted import generate, run

    (code,) = generate(function, args, TARGET, dynamic)
    calls = sum(code.wrapper.count(f"{name}.run(") for name in code.nodes)
    code_lines = [line for line in code.wrapper.splitlines() if not line.lstrip().startswith("#")]
    assert calls == kernels and not any("torch.ops.pixelfly" in line for line in code_lines)
    for given in (args, *([other] if other else [])):
        inputs = _inputs(code, given)
        for ours, eager, exact in zip(
            run(code, inputs), function(*given), function(*map(to_double, given)), strict=True
        ):
            assert_as_good_as(ours, eager, exact)
    return code


def _inputs(code: Any, args: list[Any]) -> list[Any]:
    """The wrapper's arguments: symbolic sizes first, then the tensors."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    symbols = sum(node.op == "placeholder" for node in code.graph.graph.nodes) - len(tensors)
    return [tensors[0].shape[0]] * symbols + tensors


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_at_odd_sizes(dtype: torch.dtype, transposed: bool) -> None:
    features = UNEVEN.in_features if transposed else UNEVEN.out_features
    args = operands(UNEVEN, 77, 24, dtype, transposed)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        y, t = torch.ops.pixelfly.linear(x, blocks, u, v, index, features, transposed)
        return y, t, torch.ops.pixelfly.linear(x, blocks, None, None, index, features, transposed)[0]

    check(function, args, kernels=2)


@interpreted
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [5, 200])
def test_linear_in_blocks(block: int, transposed: bool, rows: int) -> None:
    support = flat_butterfly(320, 256, block, 1)
    features = 256 if transposed else 320
    args = operands(support, rows, 32, torch.bfloat16, transposed)
    check(lambda *a: torch.ops.pixelfly.linear(*a, features, transposed)[:1], args, kernels=1)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_block_grad(dtype: torch.dtype, block: int) -> None:
    support = flat_butterfly(300, 200, block, 1)
    a, x, t = (torch.randn(90, columns).to(dtype) for columns in (300, 200, 16))
    check(
        lambda a, x, t, index: torch.ops.pixelfly.block_grad(a, x, t, index, block, block),
        [a, x, t, ops.support_index(support)],
        kernels=1,
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_grad_of_uneven_rows_split_over_many_rows(dtype: torch.dtype) -> None:
    a, x = torch.randn(1100, 100).to(dtype), torch.randn(1100, 150).to(dtype)
    args = [a, x, ops.support_index(UNEVEN)]
    check(lambda a, x, index: (torch.ops.pixelfly.block_grad(a, x, None, index, 32, 32)[0],), args, kernels=1)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@interpreted
@pytest.mark.parametrize(
    ("support", "dtype", "transposed"),
    [
        (flat_butterfly(296, 200, 64, 1), torch.float32, False),
        (flat_butterfly(200, 296, 128, 1), torch.float16, True),
        (ALIGNED, torch.bfloat16, False),
        (ALIGNED, torch.bfloat16, True),
    ],
)
def test_linear_by_tma(support: Support, dtype: torch.dtype, transposed: bool, tf32: None) -> None:
    from emitted import by_tma

    features = support.in_features if transposed else support.out_features
    args = operands(support, 300, 24, dtype, transposed)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, t = torch.ops.pixelfly.linear(x, blocks, u, v, index, features, transposed, bias)
        return F.gelu(y), t, torch.ops.pixelfly.linear(x, blocks, None, None, index, features, transposed)[0]

    args.append(torch.randn(features).to(dtype))
    with by_tma(0, programs=3):  # that each takes several tiles
        code = check(function, args, kernels=2)
    assert all("make_tensor_descriptor" in code.kernels[name] for name in code.nodes)


@interpreted
@pytest.mark.parametrize(
    ("block", "rows", "dtype"), [(64, 1100, torch.bfloat16), (64, 90, torch.float32), (128, 90, torch.float16)]
)
def test_block_grad_by_tma(block: int, rows: int, dtype: torch.dtype, tf32: None) -> None:
    from emitted import by_tma

    args = [torch.randn(rows, columns).to(dtype) for columns in (296, 200)]
    args.append(ops.support_index(flat_butterfly(296, 200, block, 1)))

    def function(a: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor]:
        return (torch.ops.pixelfly.block_grad(a, x, None, index, block, block)[0],)

    with by_tma(0):
        code = check(function, args, kernels=1)
    assert all("make_tensor_descriptor" in code.kernels[name] for name in code.nodes)


@interpreted
def test_rows_that_tma_cannot_read() -> None:
    from emitted import by_tma, generate

    args = operands(UNEVEN, 70, 0, torch.bfloat16, False)  # 300 bytes a row
    with by_tma(0):
        (code,) = generate(lambda *a: torch.ops.pixelfly.linear(*a, 100, False)[:1], args, TARGET)
    assert not any("make_tensor_descriptor" in source for source in code.kernels.values())


@interpreted
def test_tall_product_is_a_library_call() -> None:
    args = [torch.randn(70, 100), torch.randn(70, 48)]
    check(lambda a, b: (ops.tall_product(a, b),), args, kernels=0)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues_are_fused_into_the_template(dtype: torch.dtype) -> None:
    """So many that the launch is another one than that of the product alone."""
    support = flat_butterfly(128, 192, 128, 0)
    x, blocks, _, _, index = operands(support, 70, 0, dtype, False)
    bias, residual = torch.randn(128).to(dtype), torch.randn(2, 35, 128).to(dtype)

    def function(x: Tensor, blocks: Tensor, index: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.pixelfly.linear(x.view(2, 35, 192), blocks, None, None, index, 128, False, bias)[0]
        return (F.gelu(y) + residual, y, y.relu())  # y is stored too

    from emitted import generate

    args = [x, blocks, index, bias, residual]
    check(function, args, kernels=1)
    kernels = generate(function, args, TARGET)[0].kernels
    assert len(kernels) == 1, "bias, GELU and residual run in another kernel"
    if dtype != torch.float32:  # whose tiles are small anyway
        assert "'BLOCK_N': 64" in next(iter(kernels.values()))


@interpreted
def test_an_epilogue_casts() -> None:
    support = flat_butterfly(64, 64, 32, 0)
    x, blocks, _, _, index = operands(support, 50, 0, torch.bfloat16, False)
    check(
        lambda x, blocks, index: (torch.ops.pixelfly.linear(x, blocks, None, None, index, 64, False)[0].float(),),
        [x, blocks, index],
        kernels=1,
    )


@interpreted
def test_symbolic_rows_compile_once() -> None:
    support = flat_butterfly(96, 64, 32, 0)
    args, other = (operands(support, rows, 32, torch.float32, False) for rows in (100, 33))
    torch._dynamo.mark_dynamic(args[0], 0)
    check(lambda *a: torch.ops.pixelfly.linear(*a, 96, False)[:1], args, kernels=1, dynamic=None, other=other)


@interpreted
def test_columns_of_a_wider_buffer_and_one_tensor_twice() -> None:
    def function(wide: Tensor, index: Tensor) -> tuple[Tensor]:
        x = wide[:, 32:96]  # read in place, at an offset
        return (torch.ops.pixelfly.block_grad(x, x, None, index, 32, 32)[0],)

    check(function, [torch.randn(70, 160), ops.support_index(flat_butterfly(64, 64, 32, 0))], kernels=1)


# ---- P, whose kernels are not generated ----


@interpreted
@pytest.mark.parametrize("support", [flat_butterfly(128, 192, 64, 0), UNEVEN])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dense", "part"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_projection_and_its_adjoint(
    support: Support, transposed: bool, dense: torch.dtype, part: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emitted import mended

    from pixelfly_compiler.kernels import projection_gpu

    monkeypatch.setattr(projection_gpu, "gpu_of", lambda device: KNOWN[TARGET])
    projector = Projector.of(support, 48, torch.device("cpu"))
    monkeypatch.setattr(Projector, "native", lambda *args: projection_gpu)
    sides = support.out_features, support.in_features
    weight = torch.randn(sides[::-1]).t() if transposed else torch.randn(sides)
    weight = weight.to(dense)
    with mended(), torch.autocast("cpu", torch.bfloat16):  # which does not concern weights
        blocks, u = projector.project(weight, part)
        gradient = projector.adjoint(blocks, u, weight)
    assert not projection_gpu._failures
    v, gram_inv, (rows, cols) = projector.v, projector.gram_inv, projection.block_index(support)
    exact = projection.project_fixed(weight.double(), v, gram_inv, rows, cols, support.block)
    tolerance = 4 * torch.finfo(part).eps
    assert error(blocks, exact[0]) < tolerance and error(u, exact[1]) < tolerance
    exact_gradient = projection.project_adjoint(blocks.double(), u.double(), v, gram_inv, rows, cols)
    assert gradient.stride() == weight.stride() and error(gradient, exact_gradient) < 1e-5


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_projection_of_several_matrices(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from emitted import mended

    from pixelfly_compiler.kernels import projection_gpu

    monkeypatch.setattr(projection_gpu, "gpu_of", lambda device: KNOWN[TARGET])
    monkeypatch.setattr(Projector, "native", lambda *args: projection_gpu)
    projector = Projector.of(UNEVEN, 16, torch.device("cpu"))
    weight = torch.randn(3, 150, 100).mT if transposed else torch.randn(3, 100, 150)
    with mended():
        blocks, u = projector.project(weight, torch.float32)
        gradient = projector.adjoint(blocks, u, weight)
        for place, one in enumerate(weight):
            its_blocks, its_u = projector.project(one, torch.float32)
            assert torch.equal(blocks[place], its_blocks) and torch.equal(u[place], its_u)
            torch.testing.assert_close(gradient[place], projector.adjoint(its_blocks, its_u, one))
    assert gradient.stride() == weight.stride() and not projection_gpu._failures


# ---- weights of several matrices ----


def grouped(groups: int, rows: int, rank: int, dtype: torch.dtype, transposed: bool) -> list[Any]:
    """x, blocks, u, v, index: of each group, but one factor is shared, as the basis is."""
    each = [operands(UNEVEN, rows, rank, dtype, transposed) for _ in range(groups)]
    x, _, u, v, index = each[0]
    blocks, us, vs = (torch.stack([one[i] for one in each]) for i in (1, 2, 3))
    return [x, blocks, u if transposed else us, vs if transposed else v, index]


ENDS = torch.tensor([0, 7, 60, 60, 61, 110], dtype=torch.int32)  # of 117 rows: groups empty and not, seven in none


@interpreted
@pytest.mark.parametrize(
    ("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_products_of_uneven_groups(dtype: torch.dtype, transposed: bool) -> None:
    features = UNEVEN.in_features if transposed else UNEVEN.out_features
    x, blocks, u, v, index = grouped(6, 117, 24, dtype, transposed)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        y, t = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, ends, index, features, transposed)
        return F.relu(y + 1), t

    check(function, [x, blocks, u, v, ENDS, index], kernels=2 if transposed else 1)  # one for t, where v is of each


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_uneven_groups(dtype: torch.dtype) -> None:
    a, x, t = (torch.randn(117, columns).to(dtype) for columns in (100, 150, 24))

    def function(a: Tensor, x: Tensor, t: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        grads = torch.ops.pixelfly.grouped_block_grad(a, x, t, ends, index, 6, 32, 32)
        return *grads, torch.ops.pixelfly.grouped_block_grad(a, x, None, ends, None, 6, 64, 150)[0]

    check(function, [a, x, t, ENDS, ops.support_index(UNEVEN)], kernels=3)


@interpreted
def test_gradients_in_blocks_wider_than_the_matrices() -> None:
    args = [torch.randn(117, 100), torch.randn(117, 150), ENDS]
    calls = torch.ops.pixelfly.grouped_block_grad
    from emitted import generate

    (code,) = generate(lambda a, x, ends: (calls(a, x, None, ends, None, 6, 64, 160)[0],), args, TARGET)
    assert "torch.ops.pixelfly.grouped_block_grad" in code.wrapper  # the reference


@interpreted
def test_groups_of_equal_size() -> None:
    x, blocks, u, v, index = grouped(3, 3 * 50, 16, torch.float32, False)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        x = x.unflatten(0, (3, -1))
        pair = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, None, index, UNEVEN.out_features, False)
        g, x, t = pair[0].flatten(0, 1), x.flatten(0, 1), pair[1].flatten(0, 1)
        return *pair, *torch.ops.pixelfly.grouped_block_grad(g, x, t, None, index, 3, 32, 32)

    check(function, [x, blocks, u, v, index], kernels=3)


@interpreted
def test_groups_of_symbolic_rows() -> None:
    support = flat_butterfly(128, 192, 64, 0)
    blocks, index = torch.randn(2, support.nnz, 64, 64), ops.support_index(support)
    args, other = (
        [torch.randn(rows, 192), blocks, torch.tensor([rows // 3, rows - 1], dtype=torch.int32), index]
        for rows in (100, 33)
    )
    torch._dynamo.mark_dynamic(args[0], 0)

    def function(x: Tensor, blocks: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor]:
        return (torch.ops.pixelfly.grouped_linear(x, blocks, None, None, ends, index, 128, False)[0],)

    check(function, args, kernels=1, dynamic=None, other=other)
