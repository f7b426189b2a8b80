"""The projection: P is the orthogonal projection onto {support} + {u v^T}, and the best basis is never worse."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelfly_compiler.kernels.projection import (
    LEAST_OUTSIDE,
    block_index,
    densify,
    fixed_basis,
    gather_blocks,
    gram_inverse,
    project_fixed,
    project_svd,
    relative_error,
    scatter_blocks,
)
from pixelfly_compiler.kernels.support import Support, dense_support, flat_butterfly, max_strides


@dataclass(frozen=True)
class Space:
    """A support and a rank: the space that weights are projected onto."""

    support: Support
    rank: int

    def project(self, weight: Tensor) -> Tensor:
        """P(weight), dense."""
        rows, cols = block_index(self.support)
        v = fixed_basis(self.support.in_features, self.rank).to(torch.promote_types(weight.dtype, torch.float32))
        blocks, u = project_fixed(weight, v, gram_inverse(self.support, v), rows, cols, self.support.block)
        return densify(blocks, u, v, rows, cols)

    def random(self, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = self.support.out_features, self.support.in_features
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def kept_mask(self) -> Tensor:
        rows, cols = block_index(self.support)
        ones = torch.ones(self.support.nnz, self.support.block, self.support.block, dtype=torch.float64)
        return scatter_blocks(ones, rows, cols, self.support.out_features, self.support.in_features)


@st.composite
def flat_spaces(draw: st.DrawFn) -> Space:
    out_features, in_features = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    block = draw(st.sampled_from([1, 4, 7, 8, 16]))
    strides = draw(st.integers(0, max_strides(out_features, in_features, block)))
    return Space(flat_butterfly(out_features, in_features, block, strides), draw(st.integers(0, in_features)))


@st.composite
def any_spaces(draw: st.DrawFn) -> Space:
    """Supports of any kind: rows and columns of any count, also none."""
    out_features, in_features = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    block = draw(st.sampled_from([3, 8, 16]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    tiles = random.random((-(-out_features // block), -(-in_features // block))) < draw(st.floats(0, 1))
    support = Support.from_coordinates(out_features, in_features, block, *np.nonzero(tiles))
    return Space(support, draw(st.integers(0, in_features)))


spaces = st.one_of(flat_spaces(), any_spaces())
seeds = st.integers(0, 2**31)
typical = Space(flat_butterfly(48, 72, 8, 2), 8)
with_tails = Space(flat_butterfly(45, 70, 8, 2), 8)

# Gram inverses grow up to 1 / LEAST_OUTSIDE, and rounding errors with them.
TOLERANCE = {torch.float64: 1e-15 / LEAST_OUTSIDE * 100, torch.float32: 1e-7 / LEAST_OUTSIDE * 30}


# ---- P is an orthogonal projection ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(deadline=None, max_examples=100)
@given(spaces, seeds)
def test_projecting_twice_changes_nothing(dtype: torch.dtype, space: Space, seed: int) -> None:
    once = space.project(space.random(seed, dtype))
    assert once.dtype == dtype
    torch.testing.assert_close(space.project(once), once, rtol=0, atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=100)
@given(spaces, seeds)
def test_it_is_its_own_adjoint(space: Space, seed: int) -> None:
    a, b = space.random(seed), space.random(seed + 1)
    left, right = (space.project(a) * b).sum(), (a * space.project(b)).sum()
    assert abs(left - right) <= TOLERANCE[torch.float64] * a.norm() * b.norm()


@settings(deadline=None, max_examples=100)
@given(spaces, seeds)
def test_the_residual_is_orthogonal_to_the_space(space: Space, seed: int) -> None:
    weight = space.random(seed)
    residual = weight - space.project(weight)
    assert (residual * space.kept_mask()).abs().max() <= TOLERANCE[torch.float64]
    v = fixed_basis(space.support.in_features, space.rank).double()
    # Orthogonal to every u v^T, up to the directions of v left to the support (see LEAST_OUTSIDE).
    along_v = (residual @ v).norm(dim=1)
    assert (along_v <= LEAST_OUTSIDE**0.5 * weight.norm(dim=1) + TOLERANCE[torch.float64]).all()


@pytest.mark.parametrize("space", [typical, with_tails])
def test_it_is_the_least_squares_solution(space: Space) -> None:
    weight, kept = space.random(0), space.kept_mask()
    v = fixed_basis(space.support.in_features, space.rank).double()
    expected = torch.empty_like(weight)
    for row, mask in enumerate(kept.bool()):
        basis = torch.cat([torch.eye(len(mask), dtype=torch.float64)[:, mask], v], dim=1)
        expected[row] = basis @ torch.linalg.lstsq(basis, weight[row, :, None]).solution[:, 0]
    torch.testing.assert_close(space.project(weight), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(space.project(weight.float()), expected.float(), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(spaces, seeds)
def test_it_is_the_same_map_in_every_dtype(space: Space, seed: int) -> None:
    weight = space.random(seed, torch.bfloat16)
    exact = space.project(weight.double())
    projected = space.project(weight)
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.double(), exact, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("space", [Space(flat_butterfly(9, 14, 4, 1), 3), Space(flat_butterfly(8, 8, 4, 1), 3)])
def test_gradients(space: Space) -> None:
    weight = space.random(0).requires_grad_()
    assert torch.autograd.gradcheck(space.project, weight)
    upstream = space.random(1)
    (gradient,) = torch.autograd.grad(space.project(weight), weight, upstream)
    torch.testing.assert_close(gradient, space.project(upstream))


def test_keeping_everything_leaves_nothing_to_the_low_rank_term() -> None:
    space = Space(dense_support(20, 30, 8), 5)
    v = fixed_basis(30, 5)
    assert not gram_inverse(space.support, v).any()
    assert torch.equal(space.project(space.random(0)), space.random(0))


def test_keeping_no_block_is_plain_projection_onto_the_basis() -> None:
    space = Space(Support.from_coordinates(20, 30, 8, [], []), 5)
    v = fixed_basis(30, 5).double()
    torch.testing.assert_close(space.project(space.random(0)), space.random(0) @ v @ v.T, rtol=1e-6, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    weight = typical.random(0, torch.float32)
    v, (rows, cols) = fixed_basis(72, 8), block_index(typical.support)
    arguments = weight, v, gram_inverse(typical.support, v), rows, cols, 8
    expected = project_fixed(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        actual = project_fixed(*arguments)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_rows(value: float) -> None:
    weight = typical.random(0, torch.float32)
    weight[3, 5] = value
    rows, cols = block_index(typical.support)
    for approximation in (typical.project(weight), densify(*project_svd(weight, typical.support, 8), rows, cols)):
        finite = approximation.isfinite().all(dim=1)
        assert not finite[3]
        assert finite[8:].all()
    assert np.isnan(relative_error(weight, approximation))


# ---- moving blocks ----


@settings(deadline=None, max_examples=50)
@given(spaces, seeds)
def test_scatter_is_the_inverse_and_the_adjoint_of_gather(space: Space, seed: int) -> None:
    support, weight = space.support, space.random(seed)
    rows, cols = block_index(support)
    gathered = gather_blocks(weight, rows, cols, support.block)
    assert gathered.shape == (support.nnz, support.block, support.block)
    scattered = scatter_blocks(gathered, rows, cols, *weight.shape)
    assert torch.equal(scattered, weight * space.kept_mask())
    assert torch.equal(gather_blocks(scattered, rows, cols, support.block), gathered)


def test_blocks_over_the_edge_are_zero_there() -> None:
    rows, cols = block_index(dense_support(10, 6, 4))
    tiles = gather_blocks(torch.ones(10, 6), rows, cols, 4).unflatten(0, (3, 2))
    assert tiles[-1].sum() == 2 * 6
    assert tiles[:, -1].sum() == 2 * 10


# ---- the fixed basis ----


@pytest.mark.parametrize(("in_features", "rank"), [(1, 1), (64, 16), (70, 70), (768, 64), (5, 0)])
def test_the_basis_is_orthonormal(in_features: int, rank: int) -> None:
    v = fixed_basis(in_features, rank)
    assert (v.shape, v.dtype) == ((in_features, rank), torch.float32)
    torch.testing.assert_close(v.T @ v, torch.eye(rank), rtol=0, atol=1e-6)


def test_the_basis_is_the_same_in_every_process_whatever_the_seeds() -> None:
    code = (
        "import torch, numpy; torch.manual_seed(7); numpy.random.seed(7);"
        "from pixelfly_compiler.kernels.projection import fixed_basis;"
        "print(fixed_basis(100, 8).numpy().tobytes().hex())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == fixed_basis(100, 8).numpy().tobytes().hex()


def test_the_basis_survives_fake_tensors() -> None:
    with FakeTensorMode():
        fake = fixed_basis(33, 4)
    assert fake.shape == (33, 4)
    assert fixed_basis(33, 4).norm() > 0  # a cached fake tensor would fail here


@pytest.mark.parametrize("rank", [-1, 9])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must lie in 0\.\.8 .* got {rank}"):
        fixed_basis(8, rank)


# ---- the best basis ----


def decaying(out_features: int, in_features: int) -> Tensor:
    """A matrix whose singular values fall as those of trained weights do."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u * torch.arange(1, len(s) + 1) ** -0.7 @ vh


def svd_error(weight: Tensor, support: Support, rank: int, iters: int = 20) -> float:
    return relative_error(weight, densify(*project_svd(weight, support, rank, iters), *block_index(support)))


# Rounding spoils the steps here: the rank is more than the weight has rows.
ROUNDED = Support(
    22,
    43,
    4,
    crow=(0, 4, 8, 12, 16, 19, 22),
    col=(0, 1, 6, 7, 0, 1, 7, 8, 2, 3, 8, 9, 2, 3, 9, 10, 4, 5, 10, 4, 5, 6),
)


@settings(deadline=None, max_examples=60)
@given(spaces, seeds)
@example(Space(ROUNDED, 33), 0)
def test_the_best_basis_is_never_worse(space: Space, seed: int) -> None:
    weight = space.random(seed, torch.float32)
    fixed = relative_error(weight, space.project(weight))
    assert svd_error(weight, space.support, space.rank) <= fixed + TOLERANCE[torch.float32]


@pytest.mark.parametrize(("out_features", "in_features"), [(256, 256), (100, 300), (300, 100)])
def test_the_best_basis_keeps_up_with_alternating_with_truncated_svd(out_features: int, in_features: int) -> None:
    weight, rank = decaying(out_features, in_features), 16
    support = flat_butterfly(out_features, in_features, 16, 2)
    mask, lowrank = Space(support, rank).kept_mask().bool(), torch.zeros_like(weight)
    for _ in range(10):
        u, s, vh = torch.linalg.svd(torch.where(mask, lowrank, weight), full_matrices=False)
        lowrank = (u[:, :rank] * s[:rank]) @ vh[:rank]
    alternating = relative_error(weight, torch.where(mask, weight, lowrank))
    best = svd_error(weight, support, rank)
    assert best <= 1.001 * alternating
    assert best < 0.8 * relative_error(weight, Space(support, rank).project(weight))


def test_more_iterations_do_not_hurt() -> None:
    weight, support = decaying(96, 128), flat_butterfly(96, 128, 16, 1)
    errors = [svd_error(weight, support, 8, iters) for iters in (0, 1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


def test_a_compact_weight_is_recovered() -> None:
    space, generator = Space(flat_butterfly(128, 128, 16, 1), 4), torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 128, 4, generator=generator)
    weight = space.random(0, torch.float32) * space.kept_mask().float() + u @ v.T
    assert svd_error(weight, space.support, 4, iters=100) < 1e-3


def test_zero_is_projected_to_zero() -> None:
    assert svd_error(torch.zeros(48, 72), typical.support, 8) == 0.0


# ---- under the compiler ----


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo of 2.11 cannot trace torch.amp.is_autocast_available")
@pytest.mark.parametrize("space", [typical, with_tails])
def test_one_graph_under_dynamo_and_aot_autograd(space: Space) -> None:
    rows, cols = block_index(space.support)
    v = fixed_basis(space.support.in_features, space.rank)
    project = functools.partial(
        project_fixed, v=v, gram_inv=gram_inverse(space.support, v), rows=rows, cols=cols, block=space.support.block
    )
    weight = space.random(0, torch.float32).requires_grad_()
    compiled = torch.compile(lambda w: project(w), backend="aot_eager", fullgraph=True, dynamic=False)
    gradients = []
    for function in (project, compiled):
        blocks, u = function(weight)
        gradients.append(torch.autograd.grad(blocks.square().sum() + u.square().sum(), weight)[0])
    torch.testing.assert_close(*gradients)
