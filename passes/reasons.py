"""Why a weight stays dense, in words that a user understands."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch.fx import Node

from pixelfly_compiler.passes.flops import flops_of
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.weights import (
    FLOATS,
    Use,
    called,
    dtype_name,
    is_call,
    is_cast,
    stops_gradients,
    value_of,
)

BOTH_ORIENTATIONS = "the weight is used in both orientations (W and its transpose)"


def overlapping(site: str, other: str) -> str:
    if site == other:
        return "matmuls use the weight as different matrices: its dimensions in another order, or as more or fewer"
    return f"matmuls use parts of the weight that overlap: {site} and {other}"


def ineligible(weight: torch.Tensor) -> str | None:
    """Why this weight can never be sparse, whatever uses it; None if it can."""
    kind = type(weight.data)
    if kind.__name__ == "DTensor":
        return "the weight is sharded (DTensor)"
    if weight.is_quantized:
        return "the weight is quantised"
    if weight.is_complex():
        return "the weight is complex"
    if not weight.is_floating_point():
        return f"the weight is {dtype_name(weight.dtype)}, not floating point"
    if weight.dtype not in FLOATS:
        return f"the weight is {dtype_name(weight.dtype)}"
    if weight.layout is not torch.strided:
        return f"the weight has layout {weight.layout}"
    if weight.numel() == 0:
        return "the weight is empty"
    if kind is not torch.Tensor and kind.__name__ not in ("FakeTensor", "FunctionalTensor"):
        return f"the weight is a tensor subclass ({kind.__name__})"
    return None


def also_used(use: Use, scopes: Scopes, factors: Collection[Node]) -> str:
    """Of a weight of which something else than its matmuls needs the values. `factors`: matmuls with another weight."""
    why = _hint(use, scopes, factors)
    return f"the weight is also used by {_describe(use.user)}" + (f", {why}" if why else "")


def no_matmul(use: Use, scopes: Scopes, factors: Collection[Node], flops: int, multiplies: bool) -> str:
    """Of a weight that no matmul takes. `multiplies`: a matmul follows on what uses it."""
    if flops and _picks_rows(use):
        return f"used by {_describe(use.user)}, {_PICKED}"
    why = _hint(use, scopes, factors)
    if why is None and flops_of(use.user, scopes.hidden):
        picked = "" if use.selection is None else "which multiplies with what an index picks, "
        why = f"{picked}in a way pixelfly does not know"
    elif why is None:
        why = _COMPUTED if multiplies else "not by a matmul pixelfly knows"
    return f"used by {_describe(use.user)}, {why}"


def looked_up(flops: int) -> str:
    """Of an embedding's table."""
    return f"an embedding lookup, {_PICKED}" if flops else "an embedding lookup, not a matmul"


# By a part of the operation's name, the first that is in it.
_HINTS = {
    "conv_transpose": "a transposed convolution with groups, padding or windows that overlap or leave gaps",
    "conv": "a convolution with groups, padding or windows that overlap or leave gaps",
    "bmm": "which multiplies with several matrices in a way pixelfly does not know",
    "grouped_mm": "which multiplies with several matrices in a way pixelfly does not know",
    "view_as_complex": "which makes complex numbers of it",
    "as_strided": "which sees it as it lies in memory",
    "getitem": "with an index that pixelfly does not follow",
    "embedding": "whose max_norm writes to the table",
    "_add_batch_dim": "which gives vmap one part of it for each call",
    "autograd_function_apply": "a custom autograd.Function, whose own backward computes with the weight",
    "scan": "which takes it apart, or changes it, step by step",
    "map_impl": "which takes it apart",
    "while_loop": "which changes it",
}
# P is applied to what is stored, once per version; what is computed from it would be projected again in every call.
_COMPUTED = (
    "and the weight of a matmul is computed from that; only a stored weight becomes sparse: merge it, or "
    "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
)
_PICKED = "and a matmul takes the rows that it picks: only what is the same weight in each call becomes sparse"


def _hint(use: Use, scopes: Scopes, factors: Collection[Node]) -> str | None:
    """Why this use is no matmul that may become sparse; None if there is nothing that a user could change."""
    user, value = use.user, value_of(use.user)
    if user in scopes.differentiated:
        return "inside of a transform of torch.func, where our kernels have no gradient"
    if user.kwargs.get("out") is not None:
        return "which writes its result to a tensor that is there"
    if scopes.is_reshaped(use):
        return "and the shape of its result, or of what it takes, is changed in place, as by `squeeze_`"
    if user in factors:
        return "of which another parameter is taken for the weight"
    if value is not None and value.is_nested:
        return "of a nested tensor, which our kernels do not take"
    if stops_gradients(use):
        return "which no gradients go through, as with `detach` and `.data`"
    if not use.reaches(scopes.without_gradients):
        return "of a view or a copy that is made without gradients"
    if _is_term(use):
        return "which adds it to a product"
    if is_cast(user):
        return "a cast of what another has rounded, or to another device or kind of number"
    return next((text for word, text in _HINTS.items() if word in str(user.target)), None)


def _describe(node: Node) -> str:
    return "an output of the graph" if node.op == "output" else f"`{called(node)}`"


def _picks_rows(use: Use) -> bool:
    """Rows of a matrix, by an index."""
    known = is_call(use.user, (operator.getitem, torch.index_select), "index_select")
    return known and use.view.dim() == 2 and len(use.user.all_input_nodes) > 1


_ADDING = (torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm)


def _is_term(use: Use) -> bool:
    """Is the weight what `addmm` and its like add to the product?"""
    known = is_call(use.user, _ADDING, *(function.__name__ for function in _ADDING))
    return known and (use.user.args[:1] == (use.operand,) or use.user.kwargs.get("input") is use.operand)
