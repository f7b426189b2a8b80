"""Roles: what a site does, found from the dataflow graph, so that repeated layers share one decision.

Two sites have the same role if their weights have the same shape, their neighbourhoods in the dataflow graph have the
same structure (two operations up, one down, with argument positions; views and dropout do not count), and their names
differ only in layer numbers. Structure tells apart what names do not (`0.weight`, `2.weight` of a Sequential), names
tell apart what structure does not (query and key before a rotary embedding).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import networkx as nx
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.weights import called

HOPS_UP = 2
# Operations that move or mask data but do not say what a layer does.
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "expand",
    "transpose",
    "permute",
    "getattr",
}
_COPIES = {"contiguous", "clone", "detach", "to", "float", "type_as", "dropout", "split", "chunk", "getitem"}
TRANSPARENT = frozenset(_VIEWS | _COPIES)


# What carries the residual stream: a layer gets it from the layer before or, the first one, from an embedding or input.
STREAM = frozenset({"placeholder", "add", "iadd", "embedding", "cat"})


def dataflow(gm: GraphModule) -> nx.MultiDiGraph:
    """The graph and its sub-graphs' bodies: nodes have a `label`, edges the argument's `position`."""
    graph = nx.MultiDiGraph()
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        for node in module.graph.nodes:
            graph.add_node(node, label=_label(node))
            for position, source in enumerate(node.all_input_nodes):
                graph.add_edge(source, node, position=position)
    return graph


def _label(node: Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    return called(node) if node.op == "call_method" else called(node).strip("_")


def _neighbours(graph: nx.MultiDiGraph, node: Node, up: bool) -> list[tuple[int, Node]]:
    """(position, node) of the operations next to `node`, looking through transparent ones."""
    edges = graph.in_edges(node, data="position") if up else graph.out_edges(node, data="position")
    found: list[tuple[int, Node]] = []
    for source, target, position in edges:
        other = source if up else target
        if graph.nodes[other]["label"] not in TRANSPARENT:
            found.append((position, other))
        elif up:
            # Only the first argument is the data; the others say how it is viewed.
            inner = [pair for pair in _neighbours(graph, other, up) if pair[0] == 0]
            found += [(position, pair[1]) for pair in inner]
        else:
            found += _neighbours(graph, other, up)
    return found


def _up(graph: nx.MultiDiGraph, node: Node, hops: int) -> str:
    label = graph.nodes[node]["label"]
    if label in STREAM:
        return "stream"
    if hops == 0:
        return label
    sources = sorted((position, _up(graph, other, hops - 1)) for position, other in _neighbours(graph, node, up=True))
    return f"{label}({','.join(f'{position}:{text}' for position, text in sources)})"


def structure(graph: nx.MultiDiGraph, node: Node) -> str:
    """A short hash of what surrounds a matmul. Consumers are a set: the last layer feeds fewer of the same kind."""
    down = sorted({(graph.nodes[other]["label"], position) for position, other in _neighbours(graph, node, up=False)})
    return blake2b(f"{_up(graph, node, HOPS_UP)}->{down}".encode(), digest_size=4).hexdigest()


def folded_name(name: str) -> str:
    """h.0.attn.weight -> h.*.attn.weight"""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def assign_roles(gm: GraphModule, sites: Sequence[tuple[str, tuple[int, ...], Sequence[Node]]]) -> dict[str, str]:
    """Site name -> role, for sites given as (name, weight shape, matmul nodes)."""
    graph = dataflow(gm)
    roles: dict[str, str] = {}
    for name, shape, nodes in sites:
        key = f"{sorted({structure(graph, node) for node in nodes})}{shape}"
        roles[name] = f"{folded_name(name)}#{blake2b(key.encode(), digest_size=3).hexdigest()}"
    return roles
