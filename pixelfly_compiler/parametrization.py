"""A weight stored as its compact factors: W = gamma B + (1 - gamma) U V^T, all learnable (section 3.3 of the paper).

`CompactWeight` is a parametrization (`torch.nn.utils.parametrize`): reading the weight densifies it, assigning to it
projects. `torch.compile(model, backend="pixelfly")` folds the densified weight into the matmul that uses it.

**Learning rate.** Each factor is a constant times the stored tensor, factor = scale * stored, so that the user's
optimizer and the dense model's learning rate lr suit all of them. The aim: one step moves the layer's output y as far
as it would in the dense layer. Take an input x of n features, each about one, of which a row keeps the share d in
blocks; gamma as it starts; V with columns of about unit length, so that t = V^T x is about one in each of r features.

*Adam-like* optimizers move every stored element by about lr, so a factor by scale lr. The dense y moves by lr n, adding
up over n inputs; through the blocks by gamma scale lr d n, through U by (1 - gamma) scale lr r, through V by
(1 - gamma) |U| lr r n. The moves add up, so that each part is to move y half as far as the dense layer does (all the
way, for blocks alone):

    blocks: 1 / (2 gamma d)        U: n / (8 (1 - gamma) r)        V: 1

U has a factor of 4 less, since r directions seldom agree as n inputs do, and V needs no more: its move is about that
already. Both trained best on a byte-level GPT, at the dense model's best rate (`benchmarks/quality.py`).

*SGD-like* optimizers move a stored element by lr scale (the factor's gradient), so a factor by lr scale^2 times its
gradient. With g the gradient of y, the dense y moves by lr g |x|^2 = lr g n; through the blocks by
(gamma scale)^2 lr g d n, through U by ((1 - gamma) scale)^2 lr g r, through V by ((1 - gamma) scale)^2 lr (U U^T g) n,
where (1 - gamma)^2 U U^T is about the low-rank term's share s of W's variance. The moves add up, and too much diverges,
so the parts share the dense one: half of it for the blocks, a quarter each for U and V (all for blocks alone),

    blocks: sqrt(1 / (2 d)) / gamma        U: sqrt(n / (4 r)) / (1 - gamma)        V: sqrt(1 / (4 s))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixelfly_compiler.decision import Entry
from pixelfly_compiler.errors import PlanMismatchError
from pixelfly_compiler.kernels import ops, projection
from pixelfly_compiler.kernels.support import Support

GAMMA = 0.5  # where it starts
OPTIMIZERS = ("adam", "sgd")

Factors = tuple[Tensor, ...]  # blocks, or blocks, u, v and gamma: as stored


@dataclass(frozen=True)
class Scales:
    """factor = scale * stored tensor; see the module's docstring."""

    blocks: float
    u: float = 1.0
    v: float = 1.0

    @classmethod
    def of(cls, support: Support, rank: int, optimizer: str) -> Scales:
        density, features = support.density, support.in_features
        if not rank:
            return cls(1 / density if optimizer == "adam" else math.sqrt(1 / density))
        if optimizer == "adam":
            return cls(1 / (2 * GAMMA * density), features / (8 * (1 - GAMMA) * rank))
        share = lowrank_share(support, rank)
        return cls(
            math.sqrt(1 / (2 * density)) / GAMMA,
            math.sqrt(features / (4 * rank)) / (1 - GAMMA),
            math.sqrt(1 / (4 * share)),
        )


def lowrank_share(support: Support, rank: int) -> float:
    """The low-rank term's share of the elements that are kept; a new weight has this share of its variance there."""
    lowrank = rank * (support.out_features + support.in_features)
    return lowrank / (lowrank + support.kept)


class CompactWeight(nn.Module):
    """Parametrization of one weight by (blocks, u, v, gamma), or by (blocks,) where the plan's rank is 0.

    What it knows beside the factors is its plan entry and the scales. They travel in `state_dict`, as one small tensor
    of bytes, so that the factors mean the same wherever they are loaded. The support's index is made from the entry and
    is no buffer: those are averaged by EMA and emptied by `to_empty`.
    """

    def __init__(self, entry: Entry, scales: Scales, device: torch.device, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.entry = entry
        self.scales = scales
        self.order = order  # of all parameters of the module that holds the weight, before it became compact
        self.support = entry.support()
        self.rank = entry.config.rank if entry.config else 0
        self.index = _index(self.support, device)

    @classmethod
    def of(cls, entry: Entry, optimizer: str, device: torch.device, order: tuple[str, ...] = ()) -> CompactWeight:
        """With the scales for an optimizer of this kind."""
        rank = entry.config.rank if entry.config else 0
        return cls(entry, Scales.of(entry.support(), rank, optimizer), device, order)

    @classmethod
    def from_extra_state(cls, state: Tensor, device: torch.device, order: tuple[str, ...] = ()) -> CompactWeight:
        """What `get_extra_state` described."""
        return cls(*_described(state), device, order)

    def forward(
        self, blocks: Tensor, u: Tensor | None = None, v: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        if u is None or v is None or gamma is None:
            blocks = self.scales.blocks * blocks
        else:
            blocks = (self.scales.blocks * gamma) * blocks
            u = (self.scales.u * (1 - gamma)) * u
            v = v if self.scales.v == 1 else self.scales.v * v
        index = self.index.to(blocks.device)
        shape = self.support.out_features, self.support.in_features
        weight: Tensor = torch.ops.pixelfly.densify(blocks, u, v, index, *shape)
        stored = weight.t() if self.entry.transposed else weight
        region = self.entry.region
        return stored if region is None else region.weight(stored, self.entry.weight_shape)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Factors:
        """The stored factors of the best approximation of `weight`, with gamma where it starts."""
        if weight.is_meta:
            return self.from_scratch(weight)  # there is nothing to approximate
        return self._stored(weight, *projection.project_svd(self._oriented(weight), self.support, self.rank))

    @torch.no_grad()
    def from_scratch(self, weight: Tensor) -> Factors:
        """Stored factors for training anew, with the variance of `weight`, the module's own initial value.

        The kept blocks stay what they are, scaled up by sqrt(columns / kept columns) of their block row; the rest of
        the variance is in a random low-rank term.
        """
        dense, support = self._oriented(weight).float(), self.support
        share = lowrank_share(support, self.rank)
        rows, cols = projection.block_index(support, weight.device)
        gains = np.sqrt((1 - share) * support.in_features / support.row_widths()).astype(np.float32)
        gain = torch.from_numpy(gains).to(weight.device)[rows]
        blocks = gain[:, None, None] * projection.gather_blocks(dense, rows, cols, support.block)
        v = torch.randn(support.in_features, self.rank, device=weight.device) / math.sqrt(support.in_features)
        u = torch.randn(support.out_features, self.rank, device=weight.device)
        u *= dense.square().mean().sqrt() * math.sqrt(share * support.in_features / max(self.rank, 1))
        return self._stored(weight, blocks, u, v)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each stored factor."""
        support, rank = self.support, self.rank
        blocks = (support.nnz, support.block, support.block)
        if not rank:
            return {"blocks": blocks}
        # Not a scalar: FSDP2 shards every parameter along its first dimension.
        return {"blocks": blocks, "u": (support.out_features, rank), "v": (support.in_features, rank), "gamma": (1,)}

    def _oriented(self, weight: Tensor) -> Tensor:
        stored = weight if self.entry.region is None else self.entry.region.view(weight)
        return stored.t() if self.entry.transposed else stored

    def _stored(self, like: Tensor, blocks: Tensor, u: Tensor, v: Tensor) -> Factors:
        """What `forward` turns into scatter(blocks) + u v^T, in the dtype of `like`."""
        if not self.rank:
            return ((blocks / self.scales.blocks).to(like.dtype),)
        gamma = torch.full((1,), GAMMA, dtype=like.dtype, device=like.device)
        parts = (
            blocks / (self.scales.blocks * GAMMA),
            u / (self.scales.u * (1 - GAMMA)),
            v / self.scales.v,
        )
        return (*(part.to(like.dtype).contiguous() for part in parts), gamma)

    def get_extra_state(self) -> Tensor:
        """Entry and scales as JSON in bytes: a tensor, since safetensors takes nothing else."""
        text = json.dumps({"entry": asdict(self.entry), "scales": asdict(self.scales)})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.scales = self.scales_in(state)

    def scales_in(self, state: Tensor) -> Scales:
        """The scales in another weight's extra state, if its factors would fit here."""
        entry, scales = _described(state)
        if any(getattr(entry, key) != getattr(self.entry, key) for key in ("config", "transposed", "region")):
            raise PlanMismatchError(
                f"was saved as {entry.decision}, and is {self.entry.decision} here",
                site=self.entry.name,
                next_step="make the model compact with the same plan, or load_weights_ into a dense one",
            )
        return scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactWeight:
        """`.to(device)`, `to_empty` and the like: the index follows, with its values."""
        super()._apply(fn, recurse)
        self.index = _index(self.support, fn(torch.empty(0, dtype=torch.int32, device=self.index.device)).device)
        return self

    def extra_repr(self) -> str:
        support = self.support
        return (
            f"{support.out_features} x {support.in_features}, {self.entry.decision}, {self.entry.kept_share:.1%} kept"
        )


def _described(state: Tensor) -> tuple[Entry, Scales]:
    values = json.loads(bytes(state.tolist()))
    return Entry.from_dict(values["entry"]), Scales(**values["scales"])


def _index(support: Support, device: torch.device) -> Any:
    with torch.inference_mode(False):  # it is shared by all weights of this support, whoever asks first
        return ops.support_index(support, device)
