"""What Inductor will fuse behind a product, foreseen from the graph: launches are chosen before it has fused.

    y = linear(x, ...); z = exp(y) * up    ->    reads up, evaluates exp, stores z, and y if the backward needs it

Pointwise operations are fused as far as all that they read is there before the product. What only a reduction needs is
computed in the reduction's kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._inductor import config, inductor_prims
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from pixelfly_compiler.kernels.compat import size_hint

_aten, _prims = torch.ops.aten, torch.ops.prims
_VIEWS = (operator.getitem, _aten.view.default, _aten.reshape.default, _aten.expand.default)
_FUNCTIONS = ("cos", "erf", "exp", "expm1", "log", "log1p", "pow", "sigmoid", "sin", "tanh")  # many registers each
_RANDOM = inductor_prims.random


def epilogue_weight(product: Node) -> float:
    """The registers that the epilogue of the product (y, t) asks for, per output: one for each value that it reads or
    stores, three for a random number, half of one for a function that it evaluates.
    """
    costs, size = _costs_of_use(product.graph), _numel(product)
    fused, stored = set[Node](), set[Node]()
    front = [user for user in product.users if user.target is operator.getitem and user.args[1] == 0]
    while front:
        node = front.pop()
        fused.add(node)
        for user in node.users:
            fits = _is_pointwise(user) and _numel(user) == size
            if fits and all(source <= product or source in fused for source in _read(_costs(user, costs))):
                front.extend({user} - fused)
            elif _is_pointwise(user) or _is_reduction(user):  # computes the node again, from what is stored
                stored |= costs[node] & (fused | {product})
            else:
                stored.add(_unviewed(node))
    needed = set[Node]().union(*(_costs(node, costs) for node in stored - {product}))
    needed -= {node for node in (product, *fused) if not _is_function(node)}
    return len(stored) + sum(_weight(node) for node in needed if _numel(node) == size)


def _weight(node: Node) -> float:
    return 0.5 if _is_function(node) else 3 if node.target is _RANDOM else 1


def _costs_of_use(graph: Graph) -> dict[Node, set[Node]]:
    """Node -> what a kernel that uses its value reads from memory, draws and evaluates for that.

    A value is in memory if no pointwise operation made it, or if several use it and it is computed from many. Found
    once for each graph of a compilation, and kept on what ends with it: a table here would keep every graph alive.
    """
    known: dict[Graph, dict[Node, set[Node]]] = vars(V.graph).setdefault("pixelfly_costs_of_use", {})
    if graph not in known:
        found: dict[Node, set[Node]] = {}
        for node in graph.nodes:
            costs = _costs(node, found)
            in_place = _is_pointwise(node) or node.target is _aten.full.default
            lasts = len(node.users) > 1 and len(_read(costs)) > config.realize_reads_threshold
            found[node] = costs if in_place and not lasts else {node}
        known[graph] = found
    return known[graph]


def _costs(node: Node, of_use: dict[Node, set[Node]]) -> set[Node]:
    """The same of a kernel that computes the node."""
    own = {node} if _is_function(node) else set[Node]()
    return own.union(*(of_use[source] for source in node.all_input_nodes))


def _read(needed: Iterable[Node]) -> list[Node]:
    return [node for node in needed if not _is_function(node) and node.target is not _RANDOM]


def _is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target in _VIEWS or node.target is _prims.convert_element_type.default or torch.Tag.pointwise in tags


def _is_function(node: Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in _FUNCTIONS


def _is_reduction(node: Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _unviewed(node: Node) -> Node:
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _numel(node: Node) -> int:
    """Numbers in its value, in the first of several."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    return size_hint(sympy_product(value.shape), fallback=4096) if isinstance(value, Tensor) else 1
