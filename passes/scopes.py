"""Where nodes stand: under `no_grad`, inside of transforms of torch.func, beside a change of their shape in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._functorch.predispatch import _add_batch_dim, _remove_batch_dim
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.weights import Use, called, is_call, is_tagged, placeholders, sub_graphs, value_of

Hidden = Mapping[Node, tuple[Any, ...]]  # node -> sizes
_Levels = dict[Any, Any]  # level of the vmap -> size


@dataclass(frozen=True)
class Scopes:
    """Nodes that stand under `no_grad`, nodes inside of torch.func's grad, vjp and jvp, nodes whose tensor gets another
    shape in place, and, for nodes under `torch.vmap`, the sizes, which may be symbolic, of the dimensions it hides;
    also in sub-graphs. And for nodes under autocast, the types of the devices that it is on for.
    """

    without_gradients: frozenset[Node] = frozenset()
    differentiated: frozenset[Node] = frozenset()
    reshaped: frozenset[Node] = frozenset()
    hidden: Hidden = field(default_factory=dict)
    autocast: Mapping[Node, frozenset[str]] = field(default_factory=dict)

    @staticmethod
    def of(gm: GraphModule) -> Scopes:
        modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
        frozen = [node for module in modules for node in _nodes_without_gradients(module)]
        differentiated = [node for module in modules for node in _differentiated_nodes(module)]
        return Scopes(
            frozenset(frozen),
            frozenset(differentiated),
            reshaped_in_place(gm),
            _hidden_by_vmap(modules),
            _under_autocast(gm, modules),
        )

    def is_of_one_type(self, node: Node, tensors: Iterable[object]) -> bool:
        """Are the tensors that this matmul takes of one type, or, but for float64, cast to one? PyTorch raises where
        they are not, though the tensors that Dynamo traces with do not.
        """
        values = [value for tensor in tensors if (value := value_of(tensor)) is not None]
        types, on = {value.dtype for value in values}, self.autocast.get(node, ())
        return len(types) == 1 or (torch.float64 not in types and all(value.device.type in on for value in values))

    def is_reshaped(self, use: Use) -> bool:
        """Does the result of this use, or what it takes, get another shape in place?"""
        index = () if use.selection is None else (use.selection.index,)
        return not self.reshaped.isdisjoint((use.user, *use.user.all_input_nodes, *index))


def _nodes_without_gradients(module: GraphModule) -> Iterator[Node]:
    """The nodes between `torch._C._set_grad_enabled(False)` and `(True)`."""
    enabled: object = True
    for node in module.graph.nodes:
        if is_call(node, (torch._C._set_grad_enabled,)):
            enabled = node.args[0]
        if not enabled:
            yield node


def _differentiated_nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes between `_grad_increment_nesting()` and `_grad_decrement_nesting()`, and the same for `jvp`."""
    depth = 0
    for node in module.graph.nodes:
        transform, _, step = getattr(node.target, "__name__", "").strip("_").partition("_")
        if transform in ("grad", "jvp"):
            depth += {"increment_nesting": 1, "decrement_nesting": -1}.get(step, 0)
        if depth:
            yield node


def _under_autocast(gm: GraphModule, modules: Sequence[GraphModule]) -> dict[Node, frozenset[str]]:
    """Each node under autocast with the types of the devices that it is on for, here or around the compiled code."""
    values = (value_of(node) for node in placeholders(gm))
    devices = {value.device.type for value in values if value is not None}
    around = frozenset(
        device
        for device in devices
        if torch.amp.autocast_mode.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )
    found: dict[Node, frozenset[str]] = {}
    for module in modules:  # outer ones first
        if next(iter(module.graph.nodes)) not in found:
            _add_autocast(module, around, found)
    return {node: on for node, on in found.items() if on}


def _add_autocast(module: GraphModule, on: frozenset[str], found: dict[Node, frozenset[str]]) -> None:
    """Of a module and of the bodies that it runs; `on`: where it begins."""
    for node in module.graph.nodes:
        found[node] = on
        if is_call(node, (torch.amp.autocast_mode._enter_autocast,)):
            device, _, enabled, *_ = node.args
            on = on | {device} if enabled else on - {device}
        elif is_call(node, (torch.amp.autocast_mode._exit_autocast,)):
            on = found[node.args[0]]
        if (inside := sub_graphs(module, node)) is not None:
            for body in inside.bodies:
                _add_autocast(body, on, found)


def _hidden_by_vmap(modules: Sequence[GraphModule]) -> Hidden:
    """Each node with the sizes of the dimensions that `torch.vmap` hides in what it computes."""
    if not any(module.graph.find_nodes(op="call_function", target=_add_batch_dim) for module in modules):
        return {}
    hidden: dict[Node, _Levels] = {}
    for module in modules:  # outer ones first
        if next(iter(module.graph.nodes)) not in hidden:
            _add_hidden(module, {}, hidden)
    return {node: tuple(sizes.values()) for node, sizes in hidden.items() if sizes}


def _add_hidden(module: GraphModule, given: Mapping[Node, _Levels], hidden: dict[Node, _Levels]) -> None:
    """Of a module and of the bodies that it runs; `given`: what is hidden in its placeholders."""
    for node in module.graph.nodes:
        sizes = {level: size for source in node.all_input_nodes for level, size in hidden[source].items()}
        if node.target is _add_batch_dim:
            x, dim, level = node.args
            sizes[level] = x.meta["example_value"].shape[dim]
        elif node.target is _remove_batch_dim:
            sizes.pop(node.args[1], None)
        hidden[node] = given.get(node, sizes)
        if (inside := sub_graphs(module, node)) is not None:
            for body in inside.bodies:
                operands = zip(placeholders(body), inside.operands, strict=False)
                within = {inner: hidden[outer] for inner, outer in operands if isinstance(outer, Node)}
                _add_hidden(body, within, hidden)


def reshaped_in_place(gm: GraphModule) -> frozenset[Node]:
    """The nodes, also in sub-graphs, whose tensor gets another shape, or other strides, in place somewhere.

    Their value says what the tensor is in the end, and not what it was when another node took it.
    """
    nodes = [node for module in gm.modules() if isinstance(module, GraphModule) for node in module.graph.nodes]
    changed = {id(value_of(node.all_input_nodes[0])) for node in nodes if _reshapes_in_place(node)}
    return frozenset(node for node in nodes if value_of(node) is not None and id(value_of(node)) in changed)


def _reshapes_in_place(node: Node) -> bool:
    """`t_`, `squeeze_`, `resize_`: torch has a mark for them. It is on `detach_` too, which keeps the shape."""
    name = called(node)
    in_place = name.endswith("_") and name != "detach_" and bool(node.all_input_nodes)
    return in_place and is_tagged(node, torch.Tag.inplace_view)
