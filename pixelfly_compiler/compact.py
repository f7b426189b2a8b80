"""Compact forms of a model's dense weights, made at the boundary of a compiled graph and kept while they are valid.

A weight's compact form is computed once per version of the weight: after an optimizer step, `load_state_dict` or any
other in-place change it is made again. The cache holds weights weakly and lives as long as they do. In training the
projection is differentiable: gradients of (blocks, u) become the gradient of the dense weight through P's adjoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pixelfly_compiler.kernels import projection
from pixelfly_compiler.kernels.ops import support_index
from pixelfly_compiler.kernels.projection_cpu import Projector
from pixelfly_compiler.kernels.support import Support, flat_butterfly
from pixelfly_compiler.passes.rewrite import CompactInput
from pixelfly_compiler.passes.sites import SiteConfig


@lru_cache(maxsize=512)
def _basis(in_features: int, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return projection.fixed_basis(in_features, rank).to(device, dtype)


@dataclass(frozen=True)
class Compact:
    """blocks (nnz, b, b), u (out, r), v (in, r) of one weight, in the dtype the matmul runs in."""

    blocks: Tensor
    u: Tensor
    v: Tensor


@dataclass
class _Entry:
    version: int
    data_ptr: int
    compact: Compact


class CompactWeights:
    """The compact forms of all weights seen so far: weight -> (config, orientation, dtype, basis) -> `Compact`."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def clear(self) -> None:
        self._entries.clear()

    def get(self, weight: Tensor, key: CompactInput, basis: str) -> Compact:
        """The compact form of the weight as it is now, without autograd."""
        entries: dict[Any, _Entry] = self._entries.setdefault(weight, {})
        name = (key.config, key.transposed, key.dtype, basis)
        version = None if weight.is_inference() else weight._version
        entry = entries.get(name)
        if entry is None or version is None or (entry.version, entry.data_ptr) != (version, weight.data_ptr()):
            entry = _Entry(-1 if version is None else version, weight.data_ptr(), _compact(weight, key, basis))
            entries[name] = entry
        return entry.compact


@torch.no_grad()
def _compact(weight: Tensor, key: CompactInput, basis: str) -> Compact:
    dense, rank = _oriented(weight.detach(), key), key.config.rank
    if basis == "svd" and rank:
        blocks, u, v = projection.project_svd(dense, _support(dense, key.config), rank)
        return Compact(*(part.to(key.dtype).contiguous() for part in (blocks, u, v)))
    blocks, u = _projector(dense, key.config).project(dense, key.dtype)
    return Compact(blocks, u, _basis(dense.shape[1], rank, dense.device, key.dtype))


def _oriented(weight: Tensor, key: CompactInput) -> Tensor:
    """The weight as (out, in), however it is stored."""
    return weight.t() if key.transposed else weight


def _support(dense: Tensor, config: SiteConfig) -> Support:
    return flat_butterfly(dense.shape[0], dense.shape[1], config.block, config.strides)


def _projector(dense: Tensor, config: SiteConfig) -> Projector:
    return Projector.of(_support(dense, config), config.rank, dense.device)


class _Project(torch.autograd.Function):
    """The cached (blocks, u) of a weight, as a differentiable function of it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, key: CompactInput, compact: Compact) -> tuple[Tensor, Tensor]:
        ctx.key, ctx.weight = key, weight.detach()
        return compact.blocks.detach(), compact.u.detach()

    @staticmethod
    def backward(ctx: Any, g_blocks: Tensor, g_u: Tensor) -> tuple[Tensor, None, None]:
        like = _oriented(ctx.weight, ctx.key)
        return _oriented(_projector(like, ctx.key.config).adjoint(g_blocks, g_u, like), ctx.key), None, None


class CompactInputs:
    """Computes the inputs that the rewritten graph takes beyond the old ones, from the weights of each call."""

    def __init__(self, added: tuple[CompactInput, ...], weights: CompactWeights, basis: str) -> None:
        self.added, self.weights, self.basis = added, weights, basis

    def __call__(self, args: tuple[Any, ...]) -> list[Tensor]:
        made: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        inputs = []
        for key in self.added:
            weight = args[key.weight]
            if key.part == "index":
                inputs.append(support_index(_support(_oriented(weight, key), key.config), weight.device))
                continue
            which = (key.weight, key.transposed, key.dtype)
            if which not in made:
                made[which] = self._parts(weight, key)
            inputs.append(made[which][("blocks", "u", "v").index(key.part)])
        return inputs

    def _parts(self, weight: Tensor, key: CompactInput) -> tuple[Tensor, Tensor, Tensor]:
        compact = self.weights.get(weight, key, self.basis)
        if weight.requires_grad and torch.is_grad_enabled():
            return *_Project.apply(weight, key, compact), compact.v
        return compact.blocks, compact.u, compact.v
