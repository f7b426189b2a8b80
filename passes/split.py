"""Split a matmul whose weight is joined from several parameters: one matmul for each, so that each is a site.

    def forward(self, x, q, k, bias):              def forward(self, x, q, k, bias):
        w = torch.cat([q, k])                          y = F.linear(x, q, bias[:64])
        y = F.linear(x, w, bias)         -->           z = F.linear(x, k, bias[64:])
        return (y,)                                    return (torch.cat([y, z], -1),)

Parameters that are joined along the inputs get a part of x each, and what they give is added up. The joined weight
leaves the graph, and is no longer copied together in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.matmuls import matmuls
from pixelfly_compiler.passes.open import put_code
from pixelfly_compiler.passes.rewrite import erase_unused, last_first
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.sites import Match
from pixelfly_compiler.passes.strides import laid_out, order_to_keep
from pixelfly_compiler.passes.weights import arguments, is_call, may_write, uses, value_of

# How to join tensors -> the dimension, None where it is an argument.
_JOINS: dict[Any, int | None] = {
    torch.cat: None,
    torch.concat: None,
    torch.concatenate: None,
    torch.vstack: 0,
    torch.hstack: 1,
}


@dataclass(frozen=True)
class _Joined:
    """`parts`, each a parameter or a view of one, joined along a dimension of the matrix."""

    node: Node
    parts: tuple[Node, ...]
    dim: int


def split_joined_weights(gm: GraphModule) -> GraphModule:
    """Split every matmul with a weight that is joined from parameters, in the graph and its sub-graphs, in place."""
    for module in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        joins = [joined for node in module.graph.nodes if (joined := _joined(module, node)) is not None]
        by_node = {match.node: (match, joined) for joined in joins for match in _matmuls_with(gm, module, joined.node)}
        for match in last_first(match for match, _ in by_node.values()):
            _split(*by_node[match.node])
        for match, _ in by_node.values():
            erase_unused(match.weight)
        if by_node:
            module.recompile()
    return gm


def _joined(module: GraphModule, node: Node) -> _Joined | None:
    join = next((join for join in _JOINS if is_call(node, (join,))), None)
    tensors, place = arguments(node, ("tensors", "dim"))
    if join is None or not isinstance(tensors, tuple | list):
        return None
    dim: Any = _JOINS[join]
    if dim is None:
        dim = node.kwargs.get("axis", 0) if place is None else place
    parts = tuple(part for part in tensors if isinstance(part, Node) and _is_of_a_parameter(module, part, node))
    if len(parts) < len(tensors) or not isinstance(dim, int):
        return None
    return _Joined(node, parts, dim % 2)


def _is_of_a_parameter(module: GraphModule, part: Node, join: Node) -> bool:
    """Is this a matrix that shows a parameter, or some of one? What else is joined may have sizes that data tells."""
    root = part
    while root.op.startswith("call") and root.all_input_nodes:
        root = root.all_input_nodes[0]
    weight = value_of(root)
    if not isinstance(weight, nn.Parameter):
        return False
    shape = tuple(int(size) for size in weight.shape)
    views = [use.view for use in uses(module, root, shape) if use.user is join and use.operand is part]
    return any(view.dim() == 2 and view.numel() for view in views)


def _matmuls_with(gm: GraphModule, module: GraphModule, joined: Node) -> list[Match]:
    """The matmuls with all of a joined weight, if nothing else uses it or may change what it is joined from."""
    value = value_of(joined)
    if value is None:
        return []
    shape = tuple(int(size) for size in value.shape)
    matches, others = matmuls(list(uses(module, joined, shape)), joined.name, shape, Scopes.of(gm))
    whole = [match for match in matches if match.region is None and match.module is module]
    kept = len(whole) == len(matches) and not others and not any(_is_overtaken(joined, match.node) for match in whole)
    return whole if kept else []


def _is_overtaken(joined: Node, matmul: Node) -> bool:
    """May a part be written to after it was joined, and before it is used?"""
    return any(may_write(node) for node in matmul.graph.nodes if joined < node < matmul)


def _split(match: Match, joined: _Joined) -> None:
    terms = [term for term in (match.bias, match.addend) if term is not None]
    inputs = [match.x, *joined.parts, *match.operands.given, *terms]
    put_code(match.module, match.node, _code(match, joined), inputs)


def _code(match: Match, joined: _Joined) -> Callable[..., Tensor]:
    """What replaces the matmul, as a function of x, the parts, what `enter` and `leave` are given, and the bias and the
    addend if there are any.
    """
    dtype = match.weight.meta["example_value"].dtype
    along_outputs = (joined.dim == 0) != match.transposed
    product = _beside if along_outputs else _sum
    count, order = len(match.operands.given), order_to_keep(match)

    def run(x: Tensor, *inputs: Tensor) -> Tensor:
        parts, others = inputs[: len(joined.parts)], inputs[len(joined.parts) :]
        given, terms = others[:count], list(others[count:])
        weights = [(part.t() if match.transposed else part).to(dtype) for part in parts]
        bias = None if match.bias is None else terms.pop(0)
        y = match.operands.leave(product(match.operands.enter(x, *given), weights, bias), *given)
        y = y + terms[0] if terms else y
        return y if order is None else laid_out(y, order)

    return run


def _beside(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """Each weight gives some of the outputs."""
    sizes = [weight.shape[0] for weight in weights]
    biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
    return torch.cat([F.linear(x, weight, part) for weight, part in zip(weights, biases, strict=True)], -1)


def _sum(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """Each weight takes some of the inputs."""
    parts = x.split([weight.shape[1] for weight in weights], -1)
    y = F.linear(parts[0], weights[0], bias)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        y = y + F.linear(part, weight)
    return y
