"""The ways in which one site can be made sparse, with what each keeps, costs and loses.

*Blocks*: the larger, the faster per kept flop, but also the coarser: one block more per row is 1 / n of the weight.

*Strides*: any number.

*Rank*: a multiple of 16, the smallest hardware block, so that the low-rank term holds a quarter to a third of what the
site keeps (the paper's rule). A sixth to a half is the second choice, taken where a quarter to a third would miss the
budget or need smaller blocks. Where no multiple of 16 is in that range either, the nearest on both sides; and no
low-rank term only where rank 16 would be most of what the site may keep, because it is too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pixelfly_compiler.kernels.support import max_strides
from pixelfly_compiler.passes.cost import Device, dense_time, sparse_time
from pixelfly_compiler.passes.sites import Site, SiteConfig

HARDWARE_BLOCK = 16
LOWRANK_SHARE = (1 / 4, 1 / 3)
WIDER_SHARE = (1 / 6, 1 / 2)
TOO_SMALL_SHARE = 0.6
MARGIN = 1.1  # a site becomes sparse if it is predicted so many times faster: predictions err
STEP_MARGIN = 1.2  # and those of steps of training more
NEAR = 0.85  # of its share of the budget, at least: what comes near it


@dataclass(frozen=True)
class Candidate:
    """A config, its kept elements (blocks and low-rank factors), predicted seconds, and place in the preferences."""

    config: SiteConfig
    kept: int
    time: float
    order: int


def candidates(
    site: Site,
    blocks: Sequence[int],
    device: Device,
    *,
    budget: float,
    lowrank_share: float | None = None,
    training: bool = False,
    force: bool = False,
    mixing: bool = False,
    most_strides: int = 256,
) -> list[Candidate]:
    """Every config that keeps less than all and is predicted faster than dense; with `force`, faster or not.

    `training`: a whole step with the weight's projection must be faster, too, and not only with what keeps far less
    than the budget. What is preferred is by the forward pass, so that training and evaluation prefer the same.
    `mixing`: rather smaller blocks than no stride beside the diagonal.
    """
    projects = training and site.trained and not force
    limit = float("inf") if force else dense_time(site, device) / MARGIN
    step_limit = dense_time(site, device, training=True) / STEP_MARGIN
    found = []
    for place, block in enumerate(blocks):
        for strides in _strides_tried(site, block, most_strides):
            kept = SiteConfig(block, strides, 0).kept_blocks(site.out_features, site.in_features)
            for rank, penalty in _ranks(site, kept, budget, lowrank_share):
                total = kept + rank * (site.out_features + site.in_features)
                config = SiteConfig(block, strides, rank)
                full = total >= site.elements
                if full and not (force and rank == 0):
                    continue
                time = sparse_time(site, config, device)
                if time >= limit and not force:
                    continue
                if projects and sparse_time(site, config, device, training=True) >= step_limit:
                    continue
                bare = 4 * len(blocks) if mixing and not strides else 0
                found.append(Candidate(config, total, time, bare + 4 * place + penalty))
    is_near = any(way.kept >= NEAR * budget * site.elements for way in found)
    return found if is_near or not projects else []


def _strides_tried(site: Site, block: int, most: int) -> list[int]:
    """All numbers of strides; of more than `most`, the small ones and an even selection of the others."""
    top = max_strides(site.out_features, site.in_features, block)
    if top < most:
        return list(range(top + 1))
    half = most // 2
    return [*range(half), *sorted({int(value) for value in np.linspace(half, top, half)})]


def _ranks(site: Site, kept: int, budget: float, lowrank_share: float | None) -> list[tuple[int, int]]:
    """(rank, penalty) for a support of `kept` elements; the least penalty is the best rank."""
    if lowrank_share == 0:
        return [(0, 0)]
    range_of_shares = LOWRANK_SHARE if lowrank_share is None else (lowrank_share, lowrank_share)
    per_rank = site.out_features + site.in_features
    best = _multiples(kept, per_rank, *range_of_shares)
    wider = _multiples(kept, per_rank, *WIDER_SHARE) if lowrank_share is None else []
    # Multiples of 32 suit bf16 and wide vectors better.
    ranks = {rank: 2 for rank in wider} | {rank: 0 if rank % 32 == 0 else 1 for rank in best}
    if not ranks:
        target = _rank_of_share(kept, per_rank, sum(range_of_shares) / 2) / HARDWARE_BLOCK
        ranks = {HARDWARE_BLOCK * m: 2 for m in (math.floor(target), math.ceil(target)) if m > 0}
    if HARDWARE_BLOCK * per_rank > TOO_SMALL_SHARE * budget * site.elements:
        ranks[0] = 3
    most = min(site.out_features, site.in_features)
    return [(rank, penalty) for rank, penalty in ranks.items() if rank <= most]


def _multiples(kept: int, per_rank: int, low: float, high: float) -> list[int]:
    """The multiples of 16 whose share of the kept elements is within [low, high]."""
    least = math.ceil(_rank_of_share(kept, per_rank, low) / HARDWARE_BLOCK - 1e-9)
    most = math.floor(_rank_of_share(kept, per_rank, high) / HARDWARE_BLOCK + 1e-9)
    return [HARDWARE_BLOCK * m for m in range(max(least, 1), most + 1)]


def _rank_of_share(kept: int, per_rank: int, share: float) -> float:
    """r with share = r p / (kept + r p)."""
    return kept * share / (1 - share) / per_rank


# ---- error ----


def relative_errors(site: Site, configs: Sequence[SiteConfig], weight: torch.Tensor | None = None) -> list[float]:
    """Squared norm of what the projection drops over that of the weight, in expectation over the fixed basis.

    Outside the support, a random basis of r of a row's n dropped columns catches the share r / n of the energy. With a
    weight its own block energies are used, else the same energy everywhere.
    """
    energies = {block: _energy(site, block, weight) for block in {config.block for config in configs}}
    return [_relative_error(site, config, energies[config.block]) for config in configs]


def _relative_error(site: Site, config: SiteConfig, energy: np.ndarray) -> float:
    support = config.support(site.out_features, site.in_features)
    outside = max(1 - float(energy[support.rows(), support.cols()].sum()), 0.0)
    dropped_columns = max(site.in_features * (1 - support.density), 1.0)
    return outside * max(1 - config.rank / dropped_columns, 0.0)


def _energy(site: Site, block: int, weight: torch.Tensor | None) -> np.ndarray:
    """Each block's share of the weight's squared norm: (block rows, block columns)."""
    if weight is None:
        values = torch.ones(site.out_features, site.in_features)
    else:
        matrix = weight.detach() if site.region is None else site.region.view(weight.detach())
        values = matrix.to("cpu", torch.float32)
        values = values.mT if site.transposed else values
        values = values.square().sum(0).sqrt() if values.dim() == 3 else values
    padded = torch.nn.functional.pad(values.square(), (0, -values.shape[1] % block, 0, -values.shape[0] % block))
    rows, cols = padded.shape[0] // block, padded.shape[1] // block
    energy = padded.view(rows, block, cols, block).sum((1, 3)).double().numpy()
    return energy / (energy.sum() or 1.0)
