"""The operators: schema, fakes, autograd and autocast against their reference; no compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelfly_compiler.kernels import ops, reference
from pixelfly_compiler.kernels.support import Support, dense_support, flat_butterfly

UNBALANCED = Support(48, 64, 16, crow=(0, 3, 3, 4), col=(0, 1, 3, 2))  # any support will do: one row is empty
SUPPORTS = [flat_butterfly(64, 64, 16, 1), flat_butterfly(40, 70, 16, 2), UNBALANCED]


def compact(
    support: Support, rank: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    blocks = torch.randn(support.nnz, support.block, support.block, dtype=dtype)
    if rank == 0:
        return blocks, None, None
    u, v = (torch.randn(size, rank, dtype=dtype) for size in (support.out_features, support.in_features))
    return blocks, u, v


def dense(blocks: Tensor, u: Tensor | None, v: Tensor | None, support: Support) -> Tensor:
    weight = reference.scatter(blocks, ops.support_index(support), support.out_features, support.in_features)
    return weight if u is None or v is None else weight + u @ v.mT


@pytest.mark.parametrize("mapped", ["x", "blocks"])
def test_linear_under_vmap(mapped: str) -> None:
    support = SUPPORTS[1]
    blocks, u, v = compact(support, 16)
    x = torch.randn(3, 5, support.in_features).double()
    many = torch.stack([blocks, 2 * blocks, -blocks])
    weights = torch.stack([dense(part, u, v, support) for part in many])
    if mapped == "x":
        y = torch.func.vmap(lambda x: ops.linear(x, blocks, u, v, support), in_dims=1, out_dims=1)(x)
        torch.testing.assert_close(y, x @ weights[0].mT)
    else:
        y = torch.func.vmap(lambda x, blocks: ops.linear(x, blocks, u, v, support))(x, many)
        torch.testing.assert_close(y, x @ weights.mT)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rank", [0, 16])
def test_linear_is_a_matmul_with_the_dense_weight(support: Support, rank: int) -> None:
    blocks, u, v = compact(support, rank)
    weight, index = dense(blocks, u, v, support), ops.support_index(support)
    x, g = torch.randn(2, 5, support.in_features).double(), torch.randn(2, 5, support.out_features).double()
    torch.testing.assert_close(ops.linear(x, blocks, u, v, support), x @ weight.mT)
    back = torch.ops.pixelfly.linear(g, blocks, v, u, index, support.in_features, True)[0]
    torch.testing.assert_close(back, g @ weight)


@pytest.mark.parametrize("support", SUPPORTS)
def test_block_grad_is_the_kept_part_of_the_dense_gradient(support: Support) -> None:
    a, x = torch.randn(9, support.out_features).double(), torch.randn(9, support.in_features).double()
    index = ops.support_index(support)
    t = torch.randn(9, 3).double()
    blocks, gu = torch.ops.pixelfly.block_grad(a, x, t, index, support.block, support.block)
    torch.testing.assert_close(gu, a.mT @ t)
    ones = torch.ones(support.nnz, support.block, support.block).double()
    mask = reference.scatter(ones, index, support.out_features, support.in_features)
    scattered = reference.scatter(blocks, index, support.out_features, support.in_features)
    torch.testing.assert_close(scattered, (a.mT @ x) * mask)


def test_an_absent_index_means_every_block() -> None:
    support = dense_support(40, 70, 16)
    blocks, u, v = compact(support, 16)
    x = torch.randn(3, 70).double()
    with_index = torch.ops.pixelfly.linear(x, blocks, u, v, ops.support_index(support), 40, False)[0]
    torch.testing.assert_close(torch.ops.pixelfly.linear(x, blocks, u, v, None, 40, False)[0], with_index)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
def test_opcheck(transposed: bool, rank: int) -> None:
    support = UNBALANCED
    blocks, u, v = compact(support, rank, torch.float32)
    k, features = (support.out_features, support.in_features)[:: 1 if transposed else -1]
    if transposed:
        u, v = v, u
    tensors = [t.requires_grad_() if t is not None else None for t in (torch.randn(4, k), blocks, u, v)]
    index = ops.support_index(support)
    bias = torch.randn(features, requires_grad=True) if rank else None
    torch.library.opcheck(torch.ops.pixelfly.linear.default, (*tensors, index, features, transposed, bias))
    a, x, t = (torch.randn(4, size, requires_grad=True) for size in (48, 64, rank))
    torch.library.opcheck(torch.ops.pixelfly.block_grad.default, (a, x, t if rank else None, index, 16, 16))


@pytest.mark.parametrize("rank", [0, 2])
def test_first_and_second_derivatives(rank: int) -> None:
    support = Support(5, 6, 2, crow=(0, 2, 2, 4), col=(0, 2, 1, 2))
    blocks, u, v = compact(support, rank)
    x, gamma, bias = torch.randn(3, 6).double(), torch.tensor(0.7).double(), torch.randn(5).double()
    inputs = [t.requires_grad_() for t in (x, blocks, u, v, gamma, bias) if t is not None]

    def function(x: Tensor, blocks: Tensor, *rest: Tensor) -> Tensor:
        *factors, gamma, bias = rest
        u, v = factors or (None, None)
        return ops.linear(x, blocks, u, v, support, gamma=gamma, bias=bias)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradient_through_the_lowrank_intermediate() -> None:
    support = flat_butterfly(32, 32, 16, 0)
    blocks, u, v = compact(support, 16)
    tensors = [t.requires_grad_() for t in (torch.randn(3, 32).double(), blocks, u, v) if t is not None]
    index = ops.support_index(support)
    assert torch.autograd.gradcheck(lambda *a: torch.ops.pixelfly.linear(*a, index, 32, False), tensors, fast_mode=True)


def test_autocast_runs_in_the_autocast_dtype_and_mixed_dtypes_are_an_error() -> None:
    support = flat_butterfly(32, 32, 16, 0)
    blocks, u, v = compact(support, 16, torch.float32)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, blocks, u, v, support).dtype == torch.bfloat16
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"x is torch.bfloat16 but blocks is torch.float32"):
        torch.ops.pixelfly.linear(x.bfloat16().to("meta"), blocks.to("meta"), None, None, None, 32, False)


def test_nan_and_inf_reach_the_outputs_they_touch() -> None:
    support = flat_butterfly(64, 64, 16, 1)
    blocks, u, v = compact(support, 0, torch.float32)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = ops.linear(x, blocks, u, v, support)
    assert torch.isnan(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


# ---- densify ----


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rank", [0, 16])
def test_densify_is_the_dense_weight(support: Support, rank: int) -> None:
    blocks, u, v = compact(support, rank)
    weight = torch.ops.pixelfly.densify(
        blocks, u, v, ops.support_index(support), support.out_features, support.in_features
    )
    torch.testing.assert_close(weight, dense(blocks, u, v, support))
    assert weight.is_contiguous()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("has_index", [True, False])
def test_densify_opcheck_and_derivatives(rank: int, has_index: bool) -> None:
    support = Support(5, 6, 2, crow=(0, 2, 2, 4), col=(0, 2, 1, 2)) if has_index else dense_support(5, 6, 2)
    tensors = [t.requires_grad_() for t in compact(support, rank) if t is not None]
    index = ops.support_index(support) if has_index else None

    def weight(blocks: Tensor, *lowrank: Tensor) -> Tensor:
        return torch.ops.pixelfly.densify(blocks, *(lowrank or (None, None)), index, 5, 6)

    assert torch.autograd.gradcheck(weight, tensors)
    assert torch.autograd.gradgradcheck(weight, tensors)
    u, v = tensors[1:] or (None, None)
    torch.library.opcheck(torch.ops.pixelfly.densify.default, (tensors[0], u, v, index, 5, 6))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own, in jvp
@pytest.mark.parametrize("rank", [0, 16])
def test_densify_under_transforms_of_torch_func(rank: int) -> None:
    support = SUPPORTS[1]
    parts = [part for part in compact(support, rank) if part is not None]
    index, sizes = ops.support_index(support), (support.out_features, support.in_features)
    g = torch.randn(sizes).double()

    def loss(*parts: Tensor) -> Tensor:
        blocks, u, v = (*parts, None, None)[:3]
        return (torch.ops.pixelfly.densify(blocks, u, v, index, *sizes).square() * g).sum()

    places = tuple(range(len(parts)))
    gradients = torch.func.grad(loss, places)(*parts)
    for ours, exact in zip(
        gradients,
        torch.autograd.grad(loss(*(part.requires_grad_() for part in parts)), parts),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)
    parts = [part.detach() for part in parts]
    _, change = torch.func.jvp(loss, tuple(parts), tuple(parts))
    torch.testing.assert_close(change, sum((p * q).sum() for p, q in zip(parts, gradients, strict=True)))
    several = [torch.stack([part, -part]) for part in parts]
    each = torch.func.vmap(torch.func.grad(loss, places))(*several)
    for ours, exact in zip(each, torch.func.grad(loss, places)(*(-part for part in parts)), strict=True):
        torch.testing.assert_close(ours[1], exact)


def test_densify_is_exact_under_autocast_and_rounds_once_in_low_precision() -> None:
    support = flat_butterfly(64, 64, 16, 1)
    blocks, u, v = compact(support, 16, torch.float32)
    arguments = (ops.support_index(support), 64, 64)
    exact = torch.ops.pixelfly.densify(blocks, u, v, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.pixelfly.densify(blocks, u, v, *arguments), exact)
    low = [None if t is None else t.bfloat16() for t in (blocks, u, v)]
    wide = torch.ops.pixelfly.densify(*(None if t is None else t.float() for t in low), *arguments)
    assert torch.equal(torch.ops.pixelfly.densify(*low, *arguments), wide.bfloat16())
