"""Rewrite a Dynamo graph: every planned matmul becomes `pixelfly::linear` on a compact weight that is an input.

    def forward(self, x, weight, b):                  def forward(self, x, b, blocks, u, v, index):
        y = F.linear(x, weight, b)            -->         y, _ = pixelfly.linear(x, blocks, u, v, index, 64, False, b)
        return (y,)                                       return (y,)

The dense weight leaves the graph where nothing else uses it. The compact tensors are inputs and not constants, since
the same code may run with other weights of the same shape. The graph's new nodes carry no fake values: AOTAutograd,
which runs next, traces the graph anew.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import Argument
from torch.fx.proxy import GraphAppendingTracer

from pixelfly_compiler.kernels import grouped_ops  # noqa: F401 - registers torch.ops.pixelfly
from pixelfly_compiler.passes.operands import Step, same
from pixelfly_compiler.passes.regions import Region
from pixelfly_compiler.passes.sites import Match, SiteConfig
from pixelfly_compiler.passes.strides import laid_out, order_to_keep
from pixelfly_compiler.passes.weights import (
    SubGraphs,
    placeholders,
    set_operands,
    sub_graphs,
    value_of,
)


@dataclass(frozen=True)
class CompactInput:
    """One input that the rewritten graph takes instead of a weight.

    `part`: blocks, u or v, or the support's index; `weight`: its position among the inputs. `transposed`: it is stored
    (in, out), in `region` of the parameter.
    """

    part: str
    weight: int
    config: SiteConfig
    transposed: bool
    dtype: torch.dtype
    region: Region | None = None


@dataclass(frozen=True)
class Rewritten:
    """The graph's inputs after the rewrite: positions of the old inputs that remain, then the new ones."""

    kept: tuple[int, ...]
    added: tuple[CompactInput, ...]
    sites: int


def rewrite(
    gm: GraphModule,
    matches: Iterable[Match],
    configs: Mapping[str, SiteConfig],
    weights: Mapping[str, int],
    share_basis: bool = True,
) -> Rewritten:
    """Put `pixelfly::linear` in place of each match whose site has a config.

    `weights`: parameter name -> input position. `share_basis`: all weights with as many inputs take the same v.
    """
    inputs = _Inputs(gm, weights, share_basis)
    planned = [match for match in matches if match.site in configs]
    for match in last_first(planned):
        _replace(match, configs[match.site], inputs)
    for match in planned:
        erase_unused(match.weight)
    _drop_unused_operands(gm)
    kept = inputs.drop_unused()
    for module in _graphs(gm):
        module.graph.lint()
        module.recompile()
    return Rewritten(kept, tuple(inputs.added), len(planned))


def last_first(matches: Iterable[Match]) -> list[Match]:
    """The order to replace matmuls in: what a match names, its x and bias, may be the result of another match."""
    return sorted(matches, key=lambda match: match.node, reverse=True)


_KEPT_META = ("example_value", "stack_trace", "nn_module_stack")


def _replace(match: Match, config: SiteConfig, inputs: _Inputs) -> None:
    blocks, index = (inputs.get(part, match, config) for part in ("blocks", "index"))
    u, v = (inputs.get(part, match, config) if config.rank else None for part in ("u", "v"))
    put_linear(match, blocks, u, v, index, False)


def put_linear(match: Match, blocks: Argument, u: Argument, v: Argument, index: Argument, transposed: bool) -> None:
    """Put `pixelfly::linear` of these arguments, and what it does not do itself, in place of a matmul."""
    graph, node = match.module.graph, match.node
    with graph.inserting_before(node):
        given = match.operands.given
        x = _traced(match.operands.enter, match.x, *given)
        put = _linear if match.matrices is None else _grouped_linear
        y = put(match, x, blocks, u, v, index, transposed)
        if match.operands.leave is not same:
            y = _traced(match.operands.leave, y, *given)
        y = _plus(y, match.addend, match.dtype)
        order = order_to_keep(match)
        if order is not None:
            y = _traced(partial(laid_out, order=order), y)
    y.meta.update({key: node.meta[key] for key in _KEPT_META if key in node.meta})
    node.replace_all_uses_with(y)
    graph.erase_node(node)


# ---- the operators ----


def _linear(
    match: Match, x: Node, blocks: Argument, u: Argument, v: Argument, index: Argument, transposed: bool
) -> Node:
    graph = x.graph
    fused, separate = (match.bias, None) if _is_vector(match.bias, match.out_features) else (None, match.bias)
    bias = None if fused is None else graph.call_method("to", (fused, match.dtype))
    arguments = (x, blocks, u, v, index, match.out_features, transposed, bias)
    pair = graph.call_function(torch.ops.pixelfly.linear.default, arguments)
    return _plus(graph.call_function(operator.getitem, (pair, 0)), separate, match.dtype)


def _grouped_linear(
    match: Match, x: Node, blocks: Argument, u: Argument, v: Argument, index: Argument, transposed: bool
) -> Node:
    """Unlike `linear`, the operator does not cast under autocast: only some of what it stands for does."""
    graph = x.graph
    x = graph.call_method("to", (x, match.dtype))
    ends = None if match.operands.ends is None else _traced(match.operands.ends, x, *match.operands.given)
    arguments = (x, blocks, u, v, ends, index, match.out_features, transposed)
    pair = graph.call_function(torch.ops.pixelfly.grouped_linear.default, arguments)
    return _plus(graph.call_function(operator.getitem, (pair, 0)), match.bias, match.dtype)


def _is_vector(bias: Node | None, features: int) -> bool:
    """The operator takes a bias of one number for each output, and none that is broadcast."""
    value = value_of(bias)
    return value is not None and tuple(value.shape) == (features,)


class _Tracer(GraphAppendingTracer):
    """Traces a method of a tensor as the function of that name, if there is one: with methods of nodes whose values are
    not known, as ours, AOTAutograd does not cache a graph.
    """

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        function = getattr(torch, target, None) if kind == "call_method" else None
        if function is not None:
            kind, target = "call_function", function
        return super().create_node(kind, target, *args, **kwargs)


def _traced(step: Step, *nodes: Node) -> Node:
    """What the step does with these, as nodes behind them."""
    tracer = _Tracer(nodes[0].graph)
    result: Node = step(*(Proxy(node, tracer) for node in nodes)).node
    return result


def _plus(y: Node, term: Node | None, dtype: torch.dtype) -> Node:
    if term is None:
        return y
    return y.graph.call_function(operator.add, (y, y.graph.call_method("to", (term, dtype))))


def erase_unused(node: Node) -> None:
    """Erase what only brought the dense weight to its matmul. Nothing else: what has no users may have an effect."""
    if node.op.startswith("call") and not node.users and not node._erased:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            erase_unused(source)


class _Inputs:
    """The placeholders of a graph: adds those of compact weights, also to sub-graphs."""

    def __init__(self, gm: GraphModule, weights: Mapping[str, int], share_basis: bool) -> None:
        self.gm, self.weights, self.share_basis = gm, weights, share_basis
        self.placeholders = placeholders(gm)
        self.added: list[CompactInput] = []
        self._nodes: dict[tuple[GraphModule, CompactInput], Node] = {}
        self._shared: dict[tuple[object, ...], CompactInput] = {}

    def get(self, part: str, match: Match, config: SiteConfig) -> Node:
        """The placeholder, in the graph of `match`, of one part of its compact weight."""
        position = self.weights[match.parameter]
        key = CompactInput(part, position, config, match.transposed, match.dtype, match.region)
        if part == "index":
            key = self._shared.setdefault((part, match.out_features, match.in_features, config), key)
        elif part == "v" and self.share_basis:
            key = self._shared.setdefault((part, match.in_features, config.rank, match.dtype), key)
        return self._placeholder(match.module, key)

    def _placeholder(self, module: GraphModule, key: CompactInput) -> Node:
        if (module, key) not in self._nodes:
            if module is self.gm:
                self._append(module, key)
                self.added.append(key)
            else:
                parent, call, inside = _caller(self.gm, module)
                set_operands(call, (*inside.operands, self._placeholder(parent, key)))
                for body in inside.bodies:  # the other branch too
                    self._append(body, key)
        return self._nodes[module, key]

    def _append(self, module: GraphModule, key: CompactInput) -> None:
        with module.graph.inserting_after(placeholders(module)[-1]):
            node = module.graph.placeholder(f"pixelfly_{key.part}_{len(self._nodes)}")
        node._dynamo_source = None  # AOTAutograd asks every placeholder for it
        self._nodes[module, key] = node

    def drop_unused(self) -> tuple[int, ...]:
        """Remove the placeholders of weights that nothing uses any more; the positions of those that remain."""
        dropped = {position for position in self.weights.values() if not self.placeholders[position].users}
        for position in dropped:
            self.gm.graph.erase_node(self.placeholders[position])
        return tuple(i for i in range(len(self.placeholders)) if i not in dropped)


def _calls(gm: GraphModule) -> Iterator[tuple[GraphModule, Node, SubGraphs]]:
    """Every node, in `gm` or below, that runs sub-graphs; outer ones first."""
    for module in _graphs(gm):
        for node in module.graph.nodes:
            inside = sub_graphs(module, node)
            if inside is not None:
                yield module, node, inside


def _graphs(gm: GraphModule) -> list[GraphModule]:
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def _caller(gm: GraphModule, body: GraphModule) -> tuple[GraphModule, Node, SubGraphs]:
    """The module and the node, somewhere in `gm`, that run `body`."""
    return next(call for call in _calls(gm) if any(one is body for one in call[2].bodies))


def _drop_unused_operands(gm: GraphModule) -> None:
    """No body gets what none of them uses any more; the inner ones first."""
    for _, call, inside in reversed(list(_calls(gm))):
        used = []
        for place, operand in enumerate(inside.operands):
            inner = [placeholders(body)[place - len(inside.operands)] for body in inside.bodies]
            if operand is None or any(node.users for node in inner):
                used.append(operand)
                continue
            for node in inner:
                node.graph.erase_node(node)
        if len(used) < len(inside.operands):
            set_operands(call, used)
