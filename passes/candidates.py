"""The ways in which one site can be made sparse, with what each keeps, costs and loses.

*Blocks*: the larger, the faster per kept flop, but also the coarser: one block per row more is 1 / n of the weight.
*Strides*: any number. *Rank*: a multiple of 16, the smallest hardware block, such that the low-rank term holds a quarter to a
third of what the site keeps (the paper's rule); where no multiple of 16 does, the nearest on either side; and none where
even rank 16 would be more than half of what is kept, because the site is too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pixelfly_compiler.kernels.support import flat_butterfly, max_strides
from pixelfly_compiler.passes.cost import Device, dense_time, kept_of, sparse_time
from pixelfly_compiler.passes.sites import Site, SiteConfig

BLOCKS = (64, 32, 16)  # in order of preference
HARDWARE_BLOCK = 16
LOWRANK_SHARE = (1 / 4, 1 / 3)
MAX_STRIDES_TRIED = 256


@dataclass(frozen=True)
class Candidate:
    """A config with its kept elements (blocks and low-rank factors), predicted seconds, and place in the preferences."""

    config: SiteConfig
    kept: int
    time: float
    order: int


def candidates(
    site: Site,
    blocks: Sequence[int],
    device: Device,
    *,
    lowrank_share: float | None = None,
    force: bool = False,
    training: bool = False,
) -> list[Candidate]:
    """Every config that keeps less than all and is predicted faster than dense; with `force`, faster or not."""
    limit = float("inf") if force else dense_time(site, device, training)
    found = []
    for place, block in enumerate(blocks):
        for strides in _strides_tried(site, block):
            kept = kept_of(site, SiteConfig(block, strides, 0))
            for rank, penalty in _ranks(site, kept, lowrank_share):
                total = kept + rank * (site.out_features + site.in_features)
                config = SiteConfig(block, strides, rank)
                full = total >= site.elements
                if full and not (force and rank == 0):
                    continue
                time = sparse_time(site, config, device, training)
                if time < limit or force:
                    found.append(Candidate(config, total, time, 4 * place + penalty))
    return found


def _strides_tried(site: Site, block: int) -> list[int]:
    """All numbers of strides; of very many, all small ones and an even selection of the others."""
    top = max_strides(site.out_features, site.in_features, block)
    if top < MAX_STRIDES_TRIED:
        return list(range(top + 1))
    half = MAX_STRIDES_TRIED // 2
    return [*range(half), *sorted({int(value) for value in np.linspace(half, top, half)})]


def _ranks(site: Site, kept: int, lowrank_share: float | None) -> list[tuple[int, int]]:
    """(rank, penalty) for a support of `kept` elements; the least penalty is the best rank."""
    if lowrank_share == 0:
        return [(0, 0)]
    low, high = LOWRANK_SHARE if lowrank_share is None else (lowrank_share, lowrank_share)
    per_rank = site.out_features + site.in_features
    # share = r p / (kept + r p), so r = kept share / (1 - share) / p
    least, most = (kept * share / (1 - share) / per_rank / HARDWARE_BLOCK for share in (low, high))
    inside = range(math.ceil(least - 1e-9), math.floor(most + 1e-9) + 1)
    if inside:
        return [(HARDWARE_BLOCK * m, 0 if m % 2 == 0 else 1) for m in inside if m > 0]
    around = [(HARDWARE_BLOCK * m, 2) for m in (math.floor(least), math.ceil(most)) if m > 0]
    too_small = HARDWARE_BLOCK * per_rank > kept
    return [*around, (0, 3)] if too_small else around


# ---- error ----


def expected_error(site: Site, config: SiteConfig, weight: torch.Tensor | None = None) -> float:
    """Squared norm of what the projection drops, in expectation over the fixed basis.

    Outside the support a random basis of r of the row's n dropped columns catches the share r / n of the energy. With a
    weight its own block energies are used, else one unit per element.
    """
    support = flat_butterfly(site.out_features, site.in_features, config.block, config.strides)
    dropped_share = 1 - support.density
    if weight is None:
        outside = site.elements * dropped_share
    else:
        energy = block_energy(weight.t() if site.transposed else weight, config.block)
        outside = float(energy.sum() - energy[support.rows(), support.cols()].sum())
    dropped_columns = max(site.in_features * dropped_share, 1.0)
    return max(outside, 0.0) * max(1 - config.rank / dropped_columns, 0.0)


def block_energy(weight: torch.Tensor, block: int) -> np.ndarray:
    """Squared norm of each block of an (out, in) weight: (block rows, block columns)."""
    squares = weight.detach().to("cpu", torch.float64).square()
    pad = (-weight.shape[1] % block, -weight.shape[0] % block)
    padded = torch.nn.functional.pad(squares, (0, pad[0], 0, pad[1]))
    rows, cols = padded.shape[0] // block, padded.shape[1] // block
    return padded.view(rows, block, cols, block).sum((1, 3)).numpy()
