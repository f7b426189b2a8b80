"""The graph of `torch.export`, written as Dynamo writes it, so that the other passes know it.

    def forward(self, x, i):                                    def forward(self, x, i):
        w = self.w                                                  w = self.w
        body = self.submod_1                                        torch._C._set_grad_enabled(False)
        y, = wrap_with_set_grad_enabled(                            part = operator.getitem(w, i)
            False, body, x, w, i)                        -->        y = aten.linear(x, part)
        return (y,)                                                 torch._C._set_grad_enabled(True)
                                                                    return (y,)
    # body: aten.linear(x, aten.index(w, [i]))

Nothing of what is computed changes.
"""

from __future__ import annotations

import operator
from itertools import count
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.open import put_in_place
from pixelfly_compiler.passes.weights import placeholders, sub_graphs

_AUTOCAST = torch.amp.autocast_mode
# What puts code into a body of its own -> how many arguments are of the mode, before the body.
_MODES = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def as_dynamo_writes(gm: GraphModule) -> None:
    """Write the graph and its sub-graphs so, in place."""
    for node in gm.graph.find_nodes(op="call_module", target="_guards_fn"):
        gm.graph.erase_node(node)  # checks of the inputs, which the next export makes anew
    _inline_modes(gm, torch.is_grad_enabled())
    for module in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        for node in module.graph.nodes:
            node.meta.setdefault("example_value", node.meta.get("val"))
        _index_by_getitem(module)
        module.recompile()


def as_export_runs(gm: GraphModule) -> None:
    """The modes again as code enters them: what Dynamo writes is only noted by export, and not done."""
    for module in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        for node in module.graph.nodes:
            node.target = _RUN.get(node.target, node.target) if node.op == "call_function" else node.target
        module.recompile()


def _enter_autocast(*mode: Any) -> torch.autocast:
    entered = torch.autocast(*mode)
    entered.__enter__()
    return entered


def _exit_autocast(entered: torch.autocast) -> None:
    entered.__exit__(None, None, None)


_RUN: dict[Any, Any] = {_AUTOCAST._enter_autocast: _enter_autocast, _AUTOCAST._exit_autocast: _exit_autocast}


def mark_parameter(module: GraphModule, node: Node, parameter: nn.Parameter) -> None:
    """Make the fake value of this node, and of what it is in sub-graphs, a parameter as it is Dynamo's."""
    node.meta["example_value"] = nn.Parameter(node.meta["example_value"], parameter.requires_grad)
    for user in node.users:
        for body, inner in inside.carrying(node) if (inside := sub_graphs(module, user)) else ():
            mark_parameter(body, inner, parameter)


def _inline_modes(module: GraphModule, enabled: bool) -> None:
    """Code under `no_grad` or autocast, a body of its own, between the calls that enter and leave the mode.

    `enabled`: are gradients on, where the module runs?
    """
    graph, inlined = module.graph, set[str]()
    for node in list(graph.nodes):
        name = node.target.name() if isinstance(node.target, HigherOrderOperator) else None
        if name not in _MODES:
            continue
        mode, (body, *operands) = node.args[: _MODES[name]], node.args[_MODES[name] :]
        inner = getattr(module, body.target)
        with graph.inserting_before(node):
            if name == "wrap_with_autocast":
                _inline_modes(inner, enabled)
                entered = graph.call_function(_AUTOCAST._enter_autocast, mode)
                result = _copied(module, inner, operands)
                graph.call_function(_AUTOCAST._exit_autocast, (entered,))
            else:
                _inline_modes(inner, mode[0])
                graph.call_function(torch._C._set_grad_enabled, mode)
                result = _copied(module, inner, operands)
                graph.call_function(torch._C._set_grad_enabled, (enabled,))
        put_in_place(node, result)
        graph.erase_node(body)
        inlined.add(body.target)
    for name in inlined:
        delattr(module, name)
    for child in module.children():
        if isinstance(child, GraphModule):
            _inline_modes(child, enabled)


def _copied(module: GraphModule, body: GraphModule, operands: list[Any]) -> Any:
    """The body's code where nodes are being inserted; what it returns."""
    copies = dict(zip(placeholders(body), operands, strict=True))
    result = module.graph.graph_copy(body.graph, copies)
    for node in body.graph.find_nodes(op="get_attr"):
        name = next(name for i in count() if not hasattr(module, name := f"{node.target}_{i}"))
        setattr(module, name, getattr(body, node.target))
        copies[node].target = name
    return result


def _index_by_getitem(module: GraphModule) -> None:
    """`w[i]` with one index, or a list of them, into the first dimension."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.index.Tensor and len(node.args[1]) == 1:
            node.target, node.args = operator.getitem, (node.args[0], node.args[1][0])
        elif node.target is torch.ops.aten.select.int and node.args[1] == 0 and isinstance(node.args[2], Node):
            node.target, node.args = operator.getitem, (node.args[0], node.args[2])
