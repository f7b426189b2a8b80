"""What a plan means: the same model with every planned weight W replaced by P(W).

`project` is P of one weight, `project_` replaces all of a model's. The compiled dense model equals the eager model
after `project_`, and the gradient that reaches a planned weight is P of the dense gradient there. `rescale_` prepares a
new model for being trained so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixelfly_compiler.config import BASES
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.errors import PlanError
from pixelfly_compiler.kernels import projection
from pixelfly_compiler.kernels.support import Support
from pixelfly_compiler.owners import Owner, check_shape, heads, planned


def project(weight: Tensor, entry: Entry, basis: str = "fixed") -> Tensor:
    """P(W) for a weight of the entry's shape (as it is stored); a dense entry returns it as it is. Differentiable.

    Of an entry for a part of a weight, only that part changes.
    """
    check_shape(entry.name, weight.shape, entry.weight_shape, "in the plan")
    if basis not in BASES:
        raise PlanError(f"basis {basis!r}", site=entry.name, next_step=f"valid: {', '.join(BASES)}")
    if entry.config is None:
        return weight
    matrix = weight if entry.region is None else entry.region.view(weight)
    support, rank = entry.support(), entry.config.rank
    oriented = matrix.mT if entry.transposed else matrix
    (projected,) = projection.project_each(oriented, lambda one: (_project(one, support, rank, basis),))
    stored = (projected.mT if entry.transposed else projected).contiguous().to(weight.dtype)
    if entry.region is None:
        return stored
    whole = weight.clone(memory_format=torch.contiguous_format)
    part = entry.region.unfolded(whole)
    part.copy_(stored.reshape(part.shape))
    return whole


def _project(weight: Tensor, support: Support, rank: int, basis: str) -> Tensor:
    rows, cols = projection.block_index(support, weight.device)
    if rank == 0:
        blocks = projection.gather_blocks(weight, rows, cols, support.block)
        return projection.scatter_blocks(blocks, rows, cols, support.out_features, support.in_features)
    if basis == "svd":
        blocks, u, v = projection.project_svd(weight, support, rank)
    else:
        v = projection.fixed_basis(support.in_features, rank).to(weight.device)
        gram_inv = projection.gram_inverse(support, v)
        blocks, u = projection.project_fixed(weight, v, gram_inv, rows, cols, support.block)
    return projection.densify(blocks, u, v, rows, cols)


@torch.no_grad()
def project_(model: nn.Module, plan: Plan, basis: str | None = None) -> nn.Module:
    """Replace every planned weight W of `model` by P(W), in place; `basis` is the plan's by default.

    A weight that an embedding looks up too is untied: the modules that multiply with it get P(W) as a weight of their
    own, and the lookup keeps W.
    """
    for entry, holders in planned(_unwrapped(model), plan.sparse):
        users = _heads(holders, entry) if entry.shared else holders
        weight = users[0].weight  # of a head it is its own already if another part of it was projected before
        projected = project(weight, entry, basis or plan.basis)
        if entry.shared:
            own = nn.Parameter(projected, requires_grad=weight.requires_grad)
            for head in users:
                setattr(head.module, head.attribute, own)
        else:
            weight.copy_(projected)
    return model


@torch.no_grad()
def rescale_(model: nn.Module, plan: Plan) -> nn.Module:
    """Scale every planned weight W of `model`, in place, so that P(W) gets the norm that W has. Returns the model.

    For a new model, once, before it is trained from scratch with the one line. P keeps about the plan's share of a
    random weight's variance, and its initialisation is made for all of it: without this the activations shrink from
    layer to layer. A weight that an embedding looks up too stays as it is. After an error nothing has changed.
    """
    for entry, holders in planned(_unwrapped(model), plan.sparse):
        if entry.shared:
            continue
        weight = holders[0].weight
        whole, projected = (
            matrix if entry.region is None else entry.region.view(matrix) for matrix in (weight, project(weight, entry))
        )
        scale = whole.norm() / projected.norm()
        part = weight if entry.region is None else entry.region.unfolded(weight)
        part.mul_(torch.where(scale.isfinite(), scale, 1.0))  # zeros stay zeros
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def _heads(holders: Sequence[Owner], entry: Entry) -> list[Owner]:
    found = heads(holders, entry.heads)
    if not found:
        raise PlanError(
            "an embedding multiplies with its own table, so the table cannot be projected for the matmul alone",
            site=entry.name,
            next_step="give the matmul a module of its own, tied to the embedding",
        )
    return found
