"""The C++ templates on weights of several matrices: uneven groups, rows in no group, every dtype, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_lowering_cpu import DTYPES, UNEVEN, _registered, check, operands  # noqa: F401 - a fixture
from torch import Tensor

from pixelfly_compiler.kernels import grouped_ops, ops  # noqa: F401 - registers the operators
from pixelfly_compiler.kernels.support import flat_butterfly

ENDS = [0, 7, 60, 60, 61, 110]  # of 117 rows: empty groups, few and many rows, and seven that are in none

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def grouped(groups: int, rows: int, rank: int, dtype: torch.dtype, transposed: bool) -> list[Any]:
    """x, blocks, u, v, index: of each group, but one factor is shared, as the basis is."""
    each = [operands(UNEVEN, rows, rank, dtype, transposed) for _ in range(groups)]
    x, _, u, v, index = each[0]
    blocks, us, vs = (torch.stack([one[i] for one in each]) for i in (1, 2, 3))
    return [x, blocks, u if transposed else us, vs if transposed else v, index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_gradients_of_uneven_groups(dtype: torch.dtype, transposed: bool) -> None:
    features = UNEVEN.in_features if transposed else UNEVEN.out_features
    x, blocks, u, v, index = grouped(6, 117, 16, dtype, transposed)
    ends = torch.tensor(ENDS, dtype=torch.int32)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        y, t = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, ends, index, features, transposed)
        return F.relu(y + 1), t

    check(function, [x, blocks, u, v, ends, index], kernels=1)
    y, t = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, ends, index, features, transposed)
    pair = (x, y) if transposed else (y, x)

    def gradients(a: Tensor, b: Tensor, t: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.pixelfly.grouped_block_grad(a, b, t, ends, index, 6, 32, 32)

    check(gradients, [*pair, t, ends, index], kernels=1)


@pytest.mark.parametrize("rows", [5, 50])
def test_groups_of_equal_size(rows: int) -> None:
    x, blocks, u, v, index = grouped(3, 3 * rows, 16, torch.float32, False)

    def function(x: Tensor, blocks: Tensor, u: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        x = x.unflatten(0, (3, -1))
        pair = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, None, index, UNEVEN.out_features, False)
        grads = torch.ops.pixelfly.grouped_block_grad(
            pair[0].flatten(0, 1), x.flatten(0, 1), pair[1].flatten(0, 1), None, index, 3, 32, 32
        )
        return *pair, *grads

    code = check(function, [x, blocks, u, v, index], kernels=2)
    assert ("dot_rows" in code) == (rows == 5)


def test_symbolic_rows_compile_once() -> None:
    support = flat_butterfly(96, 64, 32, 0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    blocks, index = torch.randn(2, support.nnz, 32, 32), ops.support_index(support)

    def function(x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.pixelfly.grouped_linear(x, blocks, None, None, ends, index, 96, False)[0]

    compiled = torch.compile(function, backend=counter, dynamic=None)
    for rows in (100, 33, 5, 200):
        x, ends = torch.randn(rows, 64), torch.tensor([rows // 3, rows - 1], dtype=torch.int32)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x, ends), function(x, ends))
    assert counter.frame_count == 1
