"""Supports: what every size is promised (shared by all patterns), and what flat block butterfly is."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelfly_compiler.kernels.support import (
    Support,
    dense_support,
    flat_butterfly,
    kept_elements,
    max_strides,
    strides_within,
)

features = st.integers(1, 65536)
blocks = st.sampled_from([16, 32, 48, 64, 128])
# Small numbers of blocks, where every special case of the pattern lives, and sides that need not fill their last block.
small_sides = st.builds(lambda n, missing: 16 * n - missing, st.integers(1, 200), st.integers(0, 15))


def kept_blocks(support: Support) -> set[tuple[int, int]]:
    return set(zip(support.rows().tolist(), support.cols().tolist(), strict=True))


def mask(support: Support) -> np.ndarray:
    """The kept elements as a dense (out, in) boolean mask."""
    tiles = np.zeros((support.block_rows, support.block_cols), bool)
    tiles[support.rows(), support.cols()] = True
    return np.kron(tiles, np.ones((support.block, support.block), bool))[: support.out_features, : support.in_features]


def assert_balanced(support: Support) -> None:
    for counts in (support.row_counts(), support.col_counts()):
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


# ---- what every size is promised ----


def test_every_small_number_of_blocks_at_every_number_of_strides() -> None:
    block = 4
    for block_rows, block_cols in itertools.product(range(1, 41), repeat=2):
        out_features, in_features = block_rows * block - block_cols % block, block_cols * block - block_rows % 3
        previous: set[tuple[int, int]] = set()
        for strides in range(min(block_rows, block_cols)):
            support = flat_butterfly.__wrapped__(out_features, in_features, block, strides)
            assert (support.block_rows, support.block_cols) == (block_rows, block_cols)
            assert support.nnz == max(block_rows, block_cols) * (strides + 1)
            assert_balanced(support)
            assert kept_elements.__wrapped__(out_features, in_features, block, strides) == support.kept
            current = kept_blocks(support)
            assert previous < current
            previous = current
        assert len(previous) == block_rows * block_cols


@settings(deadline=None, max_examples=150)
@given(features, features, blocks, st.floats(0, 1))
def test_large_sizes(out_features: int, in_features: int, block: int, share: float) -> None:
    longer = math.ceil(max(out_features, in_features) / block)
    strides = round(share * min(max_strides(out_features, in_features, block), 100_000 // longer))
    support = flat_butterfly(out_features, in_features, block, strides)
    assert_balanced(support)
    assert support.kept == kept_elements(out_features, in_features, block, strides)


@settings(deadline=None, max_examples=150)
@given(small_sides, small_sides, blocks, st.data())
def test_the_list_may_begin_anywhere(out_features: int, in_features: int, block: int, data: st.DataObject) -> None:
    places = max_strides(out_features, in_features, block) + 1
    strides, first = data.draw(st.integers(0, places - 1)), data.draw(st.integers(0, places - 1))
    support = flat_butterfly(out_features, in_features, block, strides, first)
    at_zero = flat_butterfly(out_features, in_features, block, strides)
    assert_balanced(support)
    assert support.nnz == at_zero.nnz
    assert support.kept == kept_elements(out_features, in_features, block, strides, first) <= at_zero.kept


def test_layers_that_begin_at_different_places_compose_what_one_place_never_does() -> None:
    same = mask(flat_butterfly(8, 8, 1, 1))
    assert (np.linalg.matrix_power(same, 3) > 0).sum() == 16
    varied = [mask(flat_butterfly(8, 8, 1, 1, first)) for first in (0, 1, 2)]
    assert (np.linalg.multi_dot(varied) > 0).sum() == 64


@settings(deadline=None, max_examples=100)
@given(small_sides, small_sides, st.data())
def test_more_strides_only_add_blocks(out_features: int, in_features: int, data: st.DataObject) -> None:
    more = data.draw(st.integers(0, max_strides(out_features, in_features, 16)))
    fewer = data.draw(st.integers(0, more))
    kept_by_more = kept_blocks(flat_butterfly(out_features, in_features, 16, more))
    assert kept_blocks(flat_butterfly(out_features, in_features, 16, fewer)) <= kept_by_more


@settings(deadline=None, max_examples=300)
@given(features, features, blocks, st.floats(0, 1, exclude_min=True))
def test_strides_within_a_density_are_the_most_that_fit(o: int, i: int, block: int, density: float) -> None:
    strides = strides_within(o, i, block, density)
    if strides is None:
        assert kept_elements(o, i, block, 0) > density * o * i
        return
    assert kept_elements(o, i, block, strides) / (o * i) <= density
    if strides < max_strides(o, i, block):
        assert kept_elements(o, i, block, strides + 1) / (o * i) > density


@settings(deadline=None, max_examples=100)
@given(small_sides, small_sides, st.data())
def test_density_and_strides_round_trip(out_features: int, in_features: int, data: st.DataObject) -> None:
    strides = data.draw(st.integers(0, max_strides(out_features, in_features, 16)))
    density = flat_butterfly(out_features, in_features, 16, strides).density
    assert strides_within(out_features, in_features, 16, density) == strides


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 20), st.data())
def test_tails_are_masked(out_features: int, in_features: int, block: int, data: st.DataObject) -> None:
    strides = data.draw(st.integers(0, max_strides(out_features, in_features, block)))
    support = flat_butterfly(out_features, in_features, block, strides)
    assert support.kept == mask(support).sum()
    assert support.density == mask(support).mean()


def test_a_vocabulary_is_fast() -> None:
    build = functools.partial(flat_butterfly.__wrapped__, 50257, 768, 32, 5)
    assert min(timeit.repeat(build, number=1, repeat=5)) < 0.05


# ---- flat block butterfly ----


@pytest.mark.parametrize("n", [1, 2, 8, 32, 128])
def test_a_square_power_of_two_is_the_papers_pattern(n: int) -> None:
    for strides in range(int(math.log2(n)) + 1):
        allowed = {0, *(1 << k for k in range(strides))}
        expected = {(i, j) for i in range(n) for j in range(n) if i ^ j in allowed}
        assert kept_blocks(flat_butterfly(16 * n, 16 * n, 16, strides)) == expected


@pytest.mark.parametrize("stretch", [2, 3, 4])
def test_a_multiple_stretches_the_papers_pattern(stretch: int) -> None:
    square = kept_blocks(flat_butterfly(256, 256, 16, 3))
    tall = kept_blocks(flat_butterfly(256 * stretch, 256, 16, 3))
    wide = kept_blocks(flat_butterfly(256, 256 * stretch, 16, 3))
    assert tall == {(i * stretch + k, j) for i, j in square for k in range(stretch)}
    assert wide == {(i, j * stretch + k) for i, j in square for k in range(stretch)}


@pytest.mark.parametrize(("out_features", "in_features"), [(384, 384), (1536, 384), (384, 1152)])
def test_one_stride_is_the_diagonal_of_blocks_twice_the_size(out_features: int, in_features: int) -> None:
    diagonal = mask(flat_butterfly(out_features, in_features, 64, 0))
    assert (mask(flat_butterfly(out_features, in_features, 32, 1)) == diagonal).all()
    other = mask(flat_butterfly(out_features, in_features, 16, 3))
    assert other.sum() == diagonal.sum() and (other != diagonal).any()


def test_mixed_radix_changes_one_digit_at_a_time() -> None:
    n, radices = 24, (2, 2, 2, 3)

    def digits(index: int) -> tuple[int, ...]:
        return tuple(index // math.prod(radices[:k]) % radix for k, radix in enumerate(radices))

    def distance(i: int, j: int) -> int:
        return sum(a != b for a, b in zip(digits(i), digits(j), strict=True))

    single = sum(radix - 1 for radix in radices)
    expected = {(i, j) for i in range(n) for j in range(n) if distance(i, j) <= 1}
    assert kept_blocks(flat_butterfly(768, 768, 32, single)) == expected
    assert max(distance(i, j) for i, j in kept_blocks(flat_butterfly(768, 768, 32, single + 1))) == 2


def test_a_prime_number_of_blocks_uses_powers_of_two_on_both_sides() -> None:
    assert [flat_butterfly(31, 31, 1, strides).col[0 : strides + 1] for strides in (0, 2, 4, 6)] == [
        (0,),
        (0, 1, 30),
        (0, 1, 2, 29, 30),
        (0, 1, 2, 4, 27, 29, 30),
    ]


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_binary_groups_are_symmetric_at_every_number_of_strides(n: int) -> None:
    for strides in range(n):
        support = flat_butterfly(n, n, 1, strides)
        assert support.transpose() == support


@settings(deadline=None, max_examples=100)
@given(small_sides, small_sides, st.data())
def test_exchanging_unequal_sides_transposes(out_features: int, in_features: int, data: st.DataObject) -> None:
    strides = data.draw(st.integers(0, max_strides(out_features, in_features, 16)))
    support = flat_butterfly(out_features, in_features, 16, strides)
    exchanged = flat_butterfly(in_features, out_features, 16, strides)
    if support.block_rows != support.block_cols:
        assert support.transpose() == exchanged


@pytest.mark.parametrize(("n", "single_digit_strides", "layers"), [(6, 3, 2), (24, 5, 4), (30, 7, 3), (64, 6, 6)])
def test_all_single_digit_strides_reach_every_block(n: int, single_digit_strides: int, layers: int) -> None:
    adjacency = mask(flat_butterfly(n, n, 1, single_digit_strides))
    assert np.linalg.matrix_power(adjacency, layers).all()
    assert not np.linalg.matrix_power(adjacency, layers - 1).all()


# ---- the value ----

supports = st.builds(
    lambda o, i, block, seed, density: Support.from_coordinates(
        o, i, block, *np.nonzero(np.random.default_rng(seed).random((-(-o // block), -(-i // block))) < density)
    ),
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(1, 20),
    st.integers(0, 1000),
    st.floats(0, 1),
)


@settings(deadline=None)
@given(supports)
def test_transpose(support: Support) -> None:
    transposed, order = support.transpose(), support.transpose_order()
    assert (mask(transposed) == mask(support).T).all()
    assert (support.rows()[order] == transposed.cols()).all()
    assert (support.cols()[order] == transposed.rows()).all()
    assert transposed.transpose() == support
    assert (support.row_counts() == transposed.col_counts()).all()


@settings(deadline=None)
@given(supports)
def test_a_support_is_a_value(support: Support) -> None:
    again = Support.from_coordinates(
        support.out_features, support.in_features, support.block, support.rows()[::-1], support.cols()[::-1]
    )
    restored = pickle.loads(pickle.dumps(support))
    assert again == restored == support
    assert hash(again) == hash(restored) == hash(support)


def test_dense_support_keeps_everything() -> None:
    support = dense_support(100, 70, 16)
    assert support.kept == 7000
    assert support.density == 1.0
    assert support.nnz == 7 * 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out_features": 0}, "out_features must be at least 1, got 0"),
        ({"block": -1}, "block must be at least 1, got -1"),
        ({"crow": (0, 1)}, "crow must have 3 entries"),
        ({"crow": (1, 2, 2)}, "crow must have 3 entries"),
        ({"crow": (0, 3, 2)}, "crow must not decrease"),
        ({"col": (0, 2)}, r"block columns must lie in 0\.\.1, got 0\.\.2"),
        ({"col": (-1, 0)}, r"block columns must lie in 0\.\.1, got -1\.\.0"),
        ({"crow": (0, 2, 2), "col": (1, 0)}, "must ascend"),
        ({"crow": (0, 2, 2), "col": (1, 1)}, "must ascend"),
        ({"col": [0, 1]}, "tuples"),
    ],
)
def test_a_malformed_support_is_refused(changed: dict[str, object], message: str) -> None:
    valid = {"out_features": 32, "in_features": 32, "block": 16, "crow": (0, 1, 2), "col": (0, 1)}
    Support(**valid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Support(**{**valid, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("strides", [-1, 2])
def test_strides_out_of_range_are_refused(strides: int) -> None:
    for function in (flat_butterfly, kept_elements):
        with pytest.raises(ValueError, match=rf"strides must lie in 0\.\.1 for a \(32, 64\) .* got {strides}"):
            function(32, 64, 16, strides)
        with pytest.raises(ValueError, match=rf"first must lie in 0\.\.1, .* got {strides}"):
            function(32, 64, 16, 0, strides)


def test_block_rows_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block rows must lie in 0\.\.1, got 0\.\.2"):
        Support.from_coordinates(32, 32, 16, [0, 2], [0, 1])
