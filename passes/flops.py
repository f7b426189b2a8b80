"""What the matmuls of a graph cost that are no sites: convolutions, batched weights, weights computed from others.

With them the plan's dense flops are those of `torch.utils.flop_counter` on the model, less attention, which has no
weight.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.scopes import Hidden
from pixelfly_compiler.passes.weights import (
    SubGraphs,
    called,
    is_call,
    is_tagged,
    may_write,
    memory_of,
    only_looks,
    placeholders,
    sub_graphs,
    value_of,
)


def other_flops(
    gm: GraphModule, weights: Mapping[Node, bool], matched: Collection[Node], hidden: Hidden
) -> dict[Node, int]:
    """Weight -> flops of the operations with it, or with what is computed from weights alone, that no match covers.

    `weights` are all parameters and buffers; those that are True (not biases) are the ones to put the flops to.
    """
    flops = {weight: 0 for weight, counts in weights.items() if counts}
    _add_flops(gm, {weight: weight if counts else None for weight, counts in weights.items()}, matched, hidden, flops)
    return flops


def _add_flops(
    module: GraphModule,
    origins: dict[Node, Node | None],
    matched: Collection[Node],
    hidden: Hidden,
    flops: dict[Node, int],
    times: int = 1,
) -> None:
    """`origins`: each node that is computed from parameters, buffers and constants alone -> a weight among them, if
    there is one. What a matmul or a lookup makes of a constant, such as positions, is no weight.
    """
    constants: set[Node] = set()
    for node in module.graph.nodes:
        inputs = _read(node)
        sources = [origins[source] for source in inputs if source in origins]
        if node.op == "output" or not (sources or (not inputs and _is_constant(node))):
            continue
        origin = next((source for source in sources if source is not None), None)
        is_data = len(sources) < len(inputs) or (constants.issuperset(inputs) and _is_random(node))
        if not is_data:
            if constants.issuperset(inputs):
                constants.add(node)
            uses_weight = node in matched or is_call(node, (F.embedding, torch.embedding))
            if not uses_weight or constants.isdisjoint(inputs):
                origins[node] = origin
        elif may_write(node) and not isinstance(node.target, HigherOrderOperator):
            _forget(node.kwargs.get("out", next(iter(node.args), None)), origins)
        if (inside := _bodies(module, node)) is not None:
            for body in inside.bodies:
                known = zip(placeholders(body), inside.operands, strict=False)
                within = {inner: origins[of] for inner, of in known if isinstance(of, Node) and of in origins}
                _add_flops(body, within, matched, hidden, flops, times * inside.times)
        elif node not in matched and origin is not None:
            flops[origin] += times * flops_of(node, hidden)


def _read(node: Node) -> list[Node]:
    """What a node reads numbers from; of matrices that an index picks, the matrices: they are a weight as before."""
    inputs = [source for source in node.all_input_nodes if _has_numbers(source) and not only_looks(node, source)]
    if is_call(node, (operator.getitem, torch.index_select), "index_select"):
        value = value_of(node.args[0])
        return inputs[:1] if value is not None and value.dim() > 2 else inputs
    return inputs


def _has_numbers(node: Node) -> bool:
    """Not a size, and not the body of a higher-order operator."""
    value = node.meta.get("example_value")
    return not (isinstance(value, torch.SymInt) or (value is None and node.op == "get_attr"))


def _is_constant(node: Node) -> bool:
    """Is this tensor, made of no other, the same in each call: zeros, a range, a mask?"""
    return node.op != "placeholder" and value_of(node) is not None and not _is_random(node)


def _is_random(node: Node) -> bool:
    """Are its numbers others in each call: drawn, or what was in memory before?"""
    return "empty" in called(node) or is_tagged(node, torch.Tag.nondeterministic_seeded)


def _forget(written: object, origins: dict[Node, Node | None]) -> None:
    """A tensor that data is written to, and what it is a view of, are data from then on."""
    memory = memory_of(written)
    while isinstance(written, Node) and written.op.startswith("call"):
        origins.pop(written, None)
        written = next((source for source in written.all_input_nodes[:1] if memory & memory_of(source)), None)


def _bodies(module: GraphModule, node: Node) -> SubGraphs | None:
    """The bodies that a node runs, that of a custom `autograd.Function`'s forward among them."""
    if called(node) == "autograd_function_apply":
        return SubGraphs((getattr(module, str(node.all_input_nodes[0].target)),), node.args[2:])
    return sub_graphs(module, node)


def flops_of(node: Node, hidden: Hidden) -> int:
    """What torch's counter says of one node, for the sizes seen while tracing and all examples of a `vmap`. Attention
    has no weight, whatever is in the place of its queries.
    """
    if is_call(node, (F.scaled_dot_product_attention,)):
        return 0
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where it is installed

    try:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _without_data)
        function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*args, **kwargs)
    except Exception:  # it depends on data, or cannot run without
        return 0
    return int(counter.get_total_flops()) * math.prod(map(hint, hidden.get(node, ())))


def _without_data(node: Node) -> Any:
    return torch.utils._pytree.tree_map(_stand_in, node.meta["example_value"])


def _stand_in(value: Any) -> Any:
    """A tensor of the same sizes on the meta device: nothing is computed, and no new symbol is made."""
    if not isinstance(value, torch.Tensor):
        return hint(value) if isinstance(value, torch.SymInt) else value
    value = value.values() if value.is_nested else value  # all rows of all its tensors
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")


def hint(size: object) -> int:
    """A number for a size that may be symbolic: the value seen while tracing, 1 if there is none."""
    if not isinstance(size, torch.SymInt):
        return int(size)  # type: ignore[call-overload]
    try:
        return int(size.node.hint)
    except Exception:  # unbacked and nested sizes have none, and raise what differs by version
        return 1
