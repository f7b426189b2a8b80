"""Which blocks of a weight are kept: the `Support` value, and flat block butterfly, one pattern that makes supports.

**The paper** (Dao et al., "Pixelated Butterfly", ICLR 2022, arXiv 2112.00029): a weight of n x n blocks, n a power of
two, keeps block (i, j) if i == j or i XOR j is one of the first strides 1, 2, 4, ...; a rectangular weight stretches a
square pattern, so that each of its cells becomes a rectangle.

**Beyond the paper**, so that at every size and every number of strides the block rows are balanced (their counts of
kept blocks differ by at most one), and so are the block columns:

- *Mixed radix.* XOR is the difference in the group Z_2 x Z_2 x ...; for any n we take Z_p x Z_q x ..., with p, q, ...
  the prime factors of n in ascending order (24 = 2 * 2 * 2 * 3). Keeping the blocks whose difference is one of a list
  of offsets is a Cayley graph of that group, which is balanced for any list.
- *Order of strides.* One list of all n offsets: first 0, then those that change one digit (lowest place first), then
  two digits, and so on. `strides` counts how many are taken after 0, so 0 is the block diagonal and n - 1 is dense.
  The lowest place first has a consequence: where n is even, one stride in blocks of b joins each block to its neighbour
  and is the block diagonal in blocks of 2 b. Smaller blocks mix more only from the second stride on.
- *Where the strides begin.* Beside the diagonal the kept offsets are `strides` of the others from place `first` on, in
  a cycle; without strides it is the one offset at place `first` of the whole list. As many blocks are kept wherever
  they begin. Layers that begin at different places mix different blocks, and depth composes the whole butterfly; with
  `first` 0, the paper's pattern, all layers have the same disconnected groups.
- *Rectangles whose long side is no multiple of the short one.* The blocks left over after stretching walk around the
  short side in a cycle; see `_surplus_links`.
- *Tails.* The last block row and column may reach over the edge of the weight; what lies outside counts as masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Support:
    """The kept `block` x `block` blocks of an (out_features, in_features) weight: a hashable value.

    Stored as CSR over blocks: block row r keeps the block columns col[crow[r]:crow[r + 1]], ascending.
    Any pattern can be written so; nothing here assumes balance, nor that each row or column keeps a block.
    """

    out_features: int
    in_features: int
    block: int
    crow: tuple[int, ...]  # (block_rows + 1,)
    col: tuple[int, ...]  # (nnz,)

    def __post_init__(self) -> None:
        _check_sizes(self.out_features, self.in_features, self.block)
        _check_csr(self.crow, self.col, self.block_rows, self.block_cols)

    @classmethod
    def from_coordinates(
        cls, out_features: int, in_features: int, block: int, rows: ArrayLike, cols: ArrayLike
    ) -> Support:
        """The support that keeps the blocks (rows[n], cols[n]), given in any order, each once."""
        _check_sizes(out_features, in_features, block)
        row, col = np.asarray(rows, np.int64), np.asarray(cols, np.int64)
        block_rows = math.ceil(out_features / block)
        if row.size and not 0 <= row.min() <= row.max() < block_rows:
            raise ValueError(f"block rows must lie in 0..{block_rows - 1}, got {row.min()}..{row.max()}")
        crow = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=block_rows))))
        return cls(out_features, in_features, block, tuple(crow.tolist()), tuple(col[np.lexsort((col, row))].tolist()))

    @property
    def block_rows(self) -> int:
        return math.ceil(self.out_features / self.block)

    @property
    def block_cols(self) -> int:
        return math.ceil(self.in_features / self.block)

    @property
    def nnz(self) -> int:
        """How many blocks are kept."""
        return len(self.col)

    @cached_property
    def kept(self) -> int:
        """How many elements are kept: those inside the weight, so blocks at its edges count in part."""
        heights = _block_extents(self.out_features, self.block)
        widths = _block_extents(self.in_features, self.block)
        return int(heights[self.rows()] @ widths[self.cols()])

    @property
    def density(self) -> float:
        """Kept elements as a share of the weight's."""
        return self.kept / (self.out_features * self.in_features)

    def rows(self) -> IntArray:
        """The block row of each kept block, (nnz,)."""
        return np.repeat(np.arange(self.block_rows), self.row_counts())

    def cols(self) -> IntArray:
        """The block column of each kept block, (nnz,)."""
        return np.asarray(self.col, np.int64)

    def row_counts(self) -> IntArray:
        """Kept blocks per block row, (block_rows,)."""
        crow = np.asarray(self.crow, np.int64)
        return crow[1:] - crow[:-1]

    def col_counts(self) -> IntArray:
        """Kept blocks per block column, (block_cols,)."""
        return np.bincount(self.cols(), minlength=self.block_cols)

    def row_widths(self) -> IntArray:
        """Kept columns per block row, (block_rows,): the last block column may reach over the edge."""
        return np.bincount(
            self.rows(), _block_extents(self.in_features, self.block)[self.cols()], self.block_rows
        ).astype(np.int64)

    def transpose(self) -> Support:
        """The support of the transposed weight."""
        return Support.from_coordinates(self.in_features, self.out_features, self.block, self.cols(), self.rows())

    def transpose_order(self) -> IntArray:
        """The position here of each block of the transpose, (nnz,): `blocks[order].mT` are the transpose's blocks."""
        return np.argsort(self.cols(), kind="stable")

    @cached_property
    def _hash(self) -> int:
        return hash((self.out_features, self.in_features, self.block, self.crow, self.col))

    def __hash__(self) -> int:
        return self._hash  # cached: a support is a key of many caches and may have a hundred thousand blocks


def dense_support(out_features: int, in_features: int, block: int) -> Support:
    """The support that keeps every block."""
    return flat_butterfly(out_features, in_features, block, max_strides(out_features, in_features, block))


@lru_cache(maxsize=256)
def flat_butterfly(out_features: int, in_features: int, block: int, strides: int, first: int = 0) -> Support:
    """Flat block butterfly: the diagonal and `strides` offsets from place `first` on (see the module's docstring).

    Each block of the longer side keeps exactly strides + 1 blocks; those of the shorter side share them evenly.
    More strides only add blocks. For unequal sides, exchanging them transposes the support.
    """
    short, long = _check_strides(out_features, in_features, block, strides, first)
    linked = _links(long, short, strides, first).ravel()
    index = np.repeat(np.arange(long), strides + 1)
    rows, cols = (index, linked) if out_features >= in_features else (linked, index)
    return Support.from_coordinates(out_features, in_features, block, rows, cols)


def max_strides(out_features: int, in_features: int, block: int) -> int:
    """The number of strides that keeps every block."""
    return _block_sides(out_features, in_features, block)[0] - 1


@lru_cache(maxsize=65536)
def kept_elements(out_features: int, in_features: int, block: int, strides: int, first: int = 0) -> int:
    """`flat_butterfly(...).kept` without building the support. Nowhere more than with `first` 0.

    Whole blocks, less what the last block row and the last block column have outside the weight; only the shorter
    side's last block needs more than a multiplication.
    """
    short, long = _check_strides(out_features, in_features, block, strides, first)
    short_excess = short * block - min(out_features, in_features)
    long_excess = long * block - max(out_features, in_features)
    outside = long_excess * (strides + 1) * block
    if short_excess:
        outside += short_excess * block * _links_of_last(long, short, strides)
        corner = (_links(long, short, strides, first, at=long - 1) == short - 1).any()
        outside -= short_excess * long_excess * int(corner)
    return long * (strides + 1) * block * block - outside


def strides_within(out_features: int, in_features: int, block: int, density: float) -> int | None:
    """The most strides that keep at most the share `density` of the weight; None where even the diagonal keeps more."""
    size = out_features * in_features
    low, high = -1, max_strides(out_features, in_features, block)
    while low < high:
        middle = (low + high + 1) // 2
        if kept_elements(out_features, in_features, block, middle) / size <= density:
            low = middle
        else:
            high = middle - 1
    return low if low >= 0 else None


# ---- which blocks of the shorter side each block of the longer side keeps ----


def _links(long: int, short: int, strides: int, first: int, at: int = 0) -> IntArray:
    """The blocks of the short side kept by each block of the long side from `at` on: (long - at, strides + 1).

    Stretching gives each logical index `long // short` neighbouring blocks; the blocks left over come last.
    """
    stretch = long // short
    stretched = stretch * short
    regular = np.arange(min(at, stretched), stretched) // stretch
    surplus = np.arange(max(at, stretched), long) - stretched
    stretched_links = _add_digits(short, regular[:, None], _kept_offsets(short, strides, first))
    return np.concatenate([stretched_links, _surplus_links(long, short, strides, surplus)])


def _surplus_links(long: int, short: int, strides: int, surplus: IntArray) -> IntArray:
    """The short-side blocks of the `surplus` blocks, the long side's remainder: (len(surplus), strides + 1).

    At each stride the t = long % short surplus blocks take the next t short-side blocks in cyclic order, so at any time
    the counts on the short side differ by at most one. After short / gcd(short, t) strides the cycle closes with all
    counts equal; the next round starts one block further, so no block is taken twice.
    """
    t = long % short
    stride = np.arange(strides + 1)
    return (surplus[:, None] + stride * t + stride // _round_length(short, t)) % short


def _links_of_last(long: int, short: int, strides: int) -> int:
    """How many long-side blocks keep the short side's last block: its column (or row) count, in closed form."""
    stretch, t = divmod(long, short)
    rounds, steps = divmod(strides + 1, _round_length(short, t))
    per_round = t // math.gcd(short, t)
    taken = steps * t  # by the round under way, which began at short-side block `rounds`
    return stretch * (strides + 1) + rounds * per_round + (taken + rounds) // short - rounds // short


def _round_length(short: int, t: int) -> int:
    """Strides until t surplus blocks at a time have walked around the short side a whole number of times."""
    return short // math.gcd(short, t)


# ---- the group of block indices ----


@lru_cache(maxsize=1024)
def _radices(n: int) -> tuple[int, ...]:
    """The prime factors of n, ascending: the radices of its digits, lowest place first."""
    factors, candidate = [], 2
    while n > 1:
        if n % candidate:
            candidate += 1
        else:
            factors.append(candidate)
            n //= candidate
    return tuple(factors)


def _digit_order(radix: int) -> IntArray:
    """All values of one digit in the order they are used: 0, then +-1, +-2, +-4, ..., then the other +-m, ascending.

    Powers of two first: they reach every value of a large prime radix in a logarithmic number of layers.
    """
    magnitudes = sorted(range(1, radix // 2 + 1), key=lambda m: (m.bit_count() > 1, m))
    return np.array(list(dict.fromkeys([0, *(value for m in magnitudes for value in (m, radix - m))])))


@lru_cache(maxsize=256)
def _offsets(n: int) -> IntArray:
    """All n offsets in the order of strides, (n,): fewest non-zero digits first, then by place and `_digit_order`."""
    index, place = np.arange(n), 1
    offset, changed = np.zeros_like(index), np.zeros_like(index)
    for radix in _radices(n):
        rank = index // place % radix
        offset += _digit_order(radix)[rank] * place
        changed += rank > 0
        place *= radix
    return offset[np.lexsort((index, changed))]


def _kept_offsets(n: int, strides: int, first: int) -> IntArray:
    """The diagonal's and `strides` others, (strides + 1,). They span more of the group together than without it."""
    offsets = _offsets(n)
    if not strides:
        return offsets[first : first + 1]
    return np.append(offsets[:1], np.take(offsets[1:], range(first, first + strides), mode="wrap"))


def _add_digits(n: int, a: IntArray, b: IntArray) -> IntArray:
    """a + b in the group of n's digits, without carries (XOR where n is a power of two); a and b broadcast."""
    total, place = np.zeros(np.broadcast_shapes(a.shape, b.shape), np.int64), 1
    for radix in _radices(n):
        total += (a // place + b // place) % radix * place
        place *= radix
    return total


# ---- checks ----


def _block_sides(out_features: int, in_features: int, block: int) -> tuple[int, int]:
    """The number of blocks along the shorter and the longer side."""
    _check_sizes(out_features, in_features, block)
    return math.ceil(min(out_features, in_features) / block), math.ceil(max(out_features, in_features) / block)


def _block_extents(features: int, block: int) -> IntArray:
    """How much of each block lies inside the weight along one side, (blocks,)."""
    return np.minimum(block, features - np.arange(0, features, block))


def _check_strides(out_features: int, in_features: int, block: int, strides: int, first: int = 0) -> tuple[int, int]:
    short, long = _block_sides(out_features, in_features, block)
    if not 0 <= strides < short:
        raise ValueError(
            f"strides must lie in 0..{short - 1} for a ({out_features}, {in_features}) weight in blocks of {block}, "
            f"got {strides}"
        )
    if not 0 <= first < short:
        raise ValueError(f"first must lie in 0..{short - 1}, as strides do, got {first}")
    return short, long


def _check_sizes(out_features: int, in_features: int, block: int) -> None:
    for name, value in (("out_features", out_features), ("in_features", in_features), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_csr(crow: Sequence[int], col: Sequence[int], block_rows: int, block_cols: int) -> None:
    if not (isinstance(crow, tuple) and isinstance(col, tuple)):
        raise ValueError("crow and col must be tuples of ints, so that the support can be hashed")
    if len(crow) != block_rows + 1 or crow[0] != 0 or crow[-1] != len(col):
        raise ValueError(f"crow must have {block_rows + 1} entries from 0 to len(col) = {len(col)}")
    starts, columns = np.asarray(crow, np.int64), np.asarray(col, np.int64)
    counts = starts[1:] - starts[:-1]
    if (counts < 0).any():
        raise ValueError("crow must not decrease")
    if columns.size and not 0 <= columns.min() <= columns.max() < block_cols:
        raise ValueError(f"block columns must lie in 0..{block_cols - 1}, got {columns.min()}..{columns.max()}")
    row_of = np.repeat(np.arange(block_rows), counts)
    if (np.diff(row_of * block_cols + columns) <= 0).any():
        raise ValueError("block columns must ascend within each block row, each kept once")
