"""Which site a node of AOTAutograd's graphs belongs to, also in the branches and loops inside of them.

A product has its blocks from an input of the graph; a block gradient ends in the gradient of that input.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from pixelfly_compiler.passes.rewrite import CompactInput
from pixelfly_compiler.passes.sites import Site
from pixelfly_compiler.passes.weights import placeholders

_PRODUCTS = (torch.ops.pixelfly.linear.default, torch.ops.pixelfly.grouped_linear.default)
_GRADIENTS = (torch.ops.pixelfly.block_grad.default, torch.ops.pixelfly.grouped_block_grad.default)


def served_by_the_rewrite(
    added: Sequence[CompactInput], kept: int, sites: Sequence[tuple[int, Site]]
) -> dict[int, str]:
    """Position of a graph's input that holds the blocks of a weight, or of a part of one -> the site's name."""
    names = {(position, site.region): site.name for position, site in sites}
    return {kept + place: names[key.weight, key.region] for place, key in enumerate(added) if key.part == "blocks"}


def served_by_compact_models(positions: Mapping[str, int], kept: Sequence[int]) -> dict[int, str]:
    """The same for the weights of a compact model: their blocks are a parameter of the model's own."""
    found: dict[int, str] = {}
    for name, position in positions.items():
        blocks = re.fullmatch(r"(.*?)parametrizations\.(\w+)\.original0", name)
        if blocks and position in kept:
            found[kept.index(position)] = blocks[1] + blocks[2]
    return found


def sites_of_nodes(gm: GraphModule, served: Mapping[int, str], saved: dict[str, str]) -> dict[Node, str]:
    """The site of each product and of each block gradient.

    What a compact model computes of its blocks, the backward may take from the forward: `saved`, by the node's name.
    """
    origins = {node: _input_of(node, place) for place, node in enumerate(placeholders(gm))}
    inputs = {node: served[origin] for node, origin in origins.items() if origin in served}
    inputs |= {node: saved[node.name] for node in origins if node.name in saved}

    def site_of(blocks: Node) -> str | None:
        source = _nearest(blocks, inputs.__contains__)
        if source is None:
            return None
        saved[blocks.name] = inputs[source]
        return inputs[source]

    sites = dict(_products(gm, site_of))
    for place, value in enumerate(_outputs(gm)):
        if place in served:
            sites |= dict.fromkeys(_block_grads(gm, value), served[place])
    return sites


def _products(gm: GraphModule, site_of: Callable[[Node], str | None]) -> Iterator[tuple[Node, str]]:
    """Products with their sites. `site_of` what holds the blocks in this graph."""
    for node in gm.graph.nodes:
        if node.target in _PRODUCTS:
            site = site_of(node.args[1])
            if site is not None:
                yield node, site
        for inner in _inner_graphs(gm, node):
            yield from _products(inner, _from_outside(node, inner, site_of))


def _from_outside(
    node: Node, inner: GraphModule, site_of: Callable[[Node], str | None]
) -> Callable[[Node], str | None]:
    """`site_of` in a graph that `node` runs: its inputs are the last operands of the node."""
    operands = dict(zip(reversed(placeholders(inner)), reversed(tree_leaves(node.args)), strict=False))

    def site_inside(blocks: Node) -> str | None:
        source = _nearest(blocks, operands.__contains__)
        operand = None if source is None else operands[source]
        return site_of(operand) if isinstance(operand, Node) else None

    return site_inside


def _block_grads(gm: GraphModule, value: Any) -> Iterator[Node]:
    """All block gradients that the value is the sum of; a value that is no node has none."""
    front, seen = ([value], {value}) if isinstance(value, Node) else ([], set())
    while front:
        node = front.pop()
        source, place = node.args if node.target is operator.getitem else (node, 0)
        inner = _inner_graphs(gm, source)
        if node.target in _GRADIENTS:
            yield node
        elif inner:
            for graph in inner:
                yield from _block_grads(graph, _outputs(graph)[place])
        else:
            front += [source for source in node.all_input_nodes if source not in seen]
            seen.update(front)


def _inner_graphs(gm: GraphModule, node: Any) -> list[GraphModule]:
    """The branches of a condition, the body of a loop."""
    if not isinstance(node, Node) or node.op != "call_function":
        return []
    modules = (getattr(gm, str(source.target), None) for source in node.all_input_nodes if source.op == "get_attr")
    return [module for module in modules if isinstance(module, GraphModule)]


def _outputs(gm: GraphModule) -> Any:
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


def _nearest(start: Node, is_wanted: Callable[[Node], bool]) -> Node | None:
    """The node itself, or what it is computed from that is wanted, by as few operations as can be."""
    front, seen = [start], {start}
    while front:
        found = next(filter(is_wanted, front), None)
        if found is not None:
            return found
        front = list(dict.fromkeys(source for node in front for source in node.all_input_nodes if source not in seen))
        seen.update(front)
    return None


def _input_of(node: Node, place: int) -> int:
    """The forward's input that a placeholder is: AOTAutograd numbers them from 1, also where a backward takes some."""
    number = re.fullmatch(r"primals_(\d+)", node.name)
    return int(number[1]) - 1 if number else place
