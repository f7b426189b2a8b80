"""The operators for weights of several matrices: group by group they are the plain ones; no compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelfly_compiler.kernels import grouped_ops, ops, reference  # noqa: F401 - registers the operators
from pixelfly_compiler.kernels.support import Support, flat_butterfly

SUPPORT = flat_butterfly(40, 70, 16, 2)
SMALL = Support(5, 6, 2, crow=(0, 2, 2, 4), col=(0, 2, 1, 2))
ENDS = [0, 3, 9]  # of 10 rows: the first group is empty, the last row is in none


def compact(support: Support, rank: int, groups: int = 3) -> list[Tensor | None]:
    """blocks, u of each group, and a v that all share."""
    blocks = torch.randn(groups, support.nnz, support.block, support.block).double()
    if not rank:
        return [blocks, None, None]
    u = torch.randn(groups, support.out_features, rank).double()
    return [blocks, u, torch.randn(support.in_features, rank).double()]


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_group_meets_its_own_matrix(rank: int, transposed: bool) -> None:
    blocks, u, v = compact(SUPPORT, rank)
    index = ops.support_index(SUPPORT)
    assert blocks is not None
    weights = [
        reference.densify(blocks[e], None if u is None else u[e], v, index, 40, 70) for e in range(blocks.shape[0])
    ]
    x = torch.randn(10, 40 if transposed else 70).double()
    factors = (v, u) if transposed else (u, v)
    arguments = (torch.tensor(ENDS, dtype=torch.int32), index, 70 if transposed else 40, transposed)
    y, _ = torch.ops.pixelfly.grouped_linear(x, blocks, *factors, *arguments)
    begin = 0
    for end, weight in zip(ENDS, weights, strict=True):
        torch.testing.assert_close(y[begin:end], x[begin:end] @ (weight if transposed else weight.mT))
        begin = end
    assert not y[9:].any()


def test_without_ends_the_groups_are_of_equal_size() -> None:
    blocks, u, v = compact(SUPPORT, 16)
    index = ops.support_index(SUPPORT)
    x = torch.randn(3, 2, 2, 70).double()
    y, t = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, None, index, 40, False)
    ends = torch.tensor([4, 8, 12], dtype=torch.int32)
    other, _ = torch.ops.pixelfly.grouped_linear(x.flatten(0, 2), blocks, u, v, ends, index, 40, False)
    assert y.shape == (3, 2, 2, 40) and t.shape == (3, 2, 2, 16)
    assert torch.equal(y.flatten(0, 2), other)
    with pytest.raises(RuntimeError, match="10 rows are no 3 groups"):
        torch.ops.pixelfly.grouped_linear(torch.randn(10, 70).double(), blocks, u, v, None, index, 40, False)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("mapped", ["x", "x and ends", "x and blocks"])
def test_under_vmap_each_example_is_by_itself(mapped: str, rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Without PyTorch's warning, past Python, of a slow fallback."""
    blocks, u, v = compact(SUPPORT, rank)
    index, x = ops.support_index(SUPPORT), torch.randn(2, 4, 3, 70).double()
    ends = torch.tensor([[0, 3, 9], [2, 2, 12]], dtype=torch.int32)

    def run(x: Tensor, blocks: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        grouped = torch.ops.pixelfly.grouped_linear
        return grouped(x, blocks, u, v, ends if "ends" in mapped else None, index, 40, False)  # type: ignore[no-any-return]

    many = torch.stack([blocks, -blocks] if "blocks" in mapped else [blocks, blocks])
    dims = (1, 0 if "blocks" in mapped else None, 0 if "ends" in mapped else None)
    places = (x.movedim(0, 1), many if "blocks" in mapped else blocks, ends if "ends" in mapped else ends[0])
    result = torch.func.vmap(run, in_dims=dims)(*places)
    each = [run(x[i], many[i], ends[i]) for i in range(2)]
    for one, other in zip(result, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(other))
    assert "performance drop" not in capfd.readouterr().err


def test_ends_that_descend_are_an_error() -> None:
    blocks, u, v = compact(SUPPORT, 0)
    ends = torch.tensor([4, 2, 9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="must ascend"):
        torch.ops.pixelfly.grouped_linear(
            torch.randn(10, 70).double(), blocks, u, v, ends, ops.support_index(SUPPORT), 40, False
        )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_opcheck_and_derivatives(rank: int, transposed: bool, equal: bool) -> None:
    blocks, u, v = compact(SMALL, rank)
    ends = None if equal else torch.tensor([0, 3, 5], dtype=torch.int32)
    index = ops.support_index(SMALL)
    x = torch.randn(6, 5 if transposed else 6).double()
    features = 6 if transposed else 5
    factors = (v, u) if transposed else (u, v)
    inputs = [tensor.requires_grad_() for tensor in (x, blocks, *factors) if tensor is not None]

    def function(x: Tensor, blocks: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        u, v = factors or (None, None)
        pair = torch.ops.pixelfly.grouped_linear(x, blocks, u, v, ends, index, features, transposed)
        return pair if factors else pair[:1]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    given = (*inputs, *(() if rank else (None, None)))
    torch.library.opcheck(torch.ops.pixelfly.grouped_linear.default, (*given, ends, index, features, transposed))
    a, t = torch.randn(6, 5).double().requires_grad_(), torch.randn(6, 2).double().requires_grad_()
    x = torch.randn(6, 6).double().requires_grad_()
    arguments = (a, x, t if rank else None, ends, index, 3, 2, 2)
    torch.library.opcheck(torch.ops.pixelfly.grouped_block_grad.default, arguments)


def test_autocast_leaves_them_alone_and_mixed_dtypes_are_an_error() -> None:
    blocks, u, v = compact(SUPPORT, 16)
    x, index = torch.randn(9, 70).double(), ops.support_index(SUPPORT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.pixelfly.grouped_linear(x, blocks, u, v, None, index, 40, False)[0].dtype == torch.float64
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"grouped_linear: x is torch.float32 but"):
        torch.ops.pixelfly.grouped_linear(
            x.float().to("meta"), torch.empty(3, 9, 16, 16).double(), None, None, None, None, 40, False
        )
