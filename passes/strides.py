"""Strides of results: `leave` gives others than the matmul has that it stands for, and some of what follows sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Node

from pixelfly_compiler.passes.flops import hint
from pixelfly_compiler.passes.operands import same
from pixelfly_compiler.passes.sites import Match
from pixelfly_compiler.passes.weights import called, may_write, namespace, value_of


def order_to_keep(match: Match) -> list[int] | None:
    """In which order in memory the dimensions of what replaces the matmul have to be laid out, if in any."""
    order = _order_in_memory(match)
    return order if order is not None and _is_seen(match.node) else None


def _order_in_memory(match: Match) -> list[int] | None:
    """The node's dimensions by their strides, the largest first; None where ours has them in the same order. Those that
    are 1 wide come first: `cond` refuses a result where one lies in memory between two that are flattened.
    """
    value, operands = value_of(match.node), match.operands
    if value is None or operands.leave is same:
        return None
    given = [_sketch(node) for node in operands.given]
    entered = operands.enter(_sketch(match.x), *given)
    ours = operands.leave(entered.new_empty(*entered.shape[:-1], match.out_features), *given)
    narrow = [dim for dim, size in enumerate(ours.shape) if size == 1]
    wide = [dim for dim in range(ours.dim()) if dim not in narrow]
    strides = list(map(hint, value.stride()))
    order = sorted(wide, key=lambda dim: -strides[dim])
    return None if order == sorted(wide, key=lambda dim: -ours.stride(dim)) else narrow + order


def _sketch(node: Node) -> torch.Tensor:
    """A tensor without values like that of the node, of the sizes that are likely."""
    value = value_of(node)
    assert value is not None
    sizes, strides = ([hint(number) for number in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def laid_out(y: Any, order: list[int]) -> Any:
    """A copy with its dimensions in this order in memory."""
    if order == sorted(order):
        return y.clone(memory_format=torch.contiguous_format)
    there = y.permute(order).clone(memory_format=torch.contiguous_format)
    return there.permute([order.index(dim) for dim in range(len(order))])


# Their results have strides of their own.
_FRESH = ("linear", "layer_norm", "matmul", "mm", "addmm", "bmm", "softmax", "conv1d", "conv2d", "conv3d")
# They fail, or mean something else, with other strides.
_ASKING = ("view", "view_as", "as_strided", "view_as_complex", "view_as_real", "stride", "is_contiguous")
# Views of one memory format, copies of another.
_AT_TIMES_COPIES = ("reshape", "reshape_as", "flatten", "ravel", "contiguous", "unflatten")


def _is_seen(node: Node) -> bool:
    """May anything tell this result, or what takes its strides over, from one with other strides?"""
    seen, front = {(node, False)}, [(node, False)]
    while front:
        source, copied = front.pop()
        for user in source.users:
            name, value = called(user), value_of(user)
            if user.op == "output" or name in _ASKING or not _is_of_torch(user) or (copied and may_write(user)):
                return True
            step = (user, copied or name in _AT_TIMES_COPIES)
            if name in _FRESH or (value is not None and value.dim() <= 1 and not step[1]):
                continue
            if step not in seen:
                seen.add(step)
                front.append(step)
    return False


def _is_of_torch(user: Node) -> bool:
    """PyTorch's or ours: not an operator of others, nor one that runs a sub-graph."""
    if user.op != "call_function":
        return user.op == "call_method"
    return not isinstance(user.target, HigherOrderOperator) and namespace(user) in (None, "aten", "prims", "pixelfly")
