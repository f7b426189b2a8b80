"""What the matmuls of a graph cost that are no sites: convolutions, batched weights, weights computed from others.

With them the plan's dense flops are those of `torch.utils.flop_counter` on the model, less attention, which has no
weight.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.weights import is_call, only_looks, placeholders, sub_graphs, value_of


def other_flops(gm: GraphModule, weights: Mapping[Node, bool], matched: Collection[Node]) -> dict[Node, int]:
    """Weight -> flops of the operations with it, or with what is computed from weights alone, that no match covers.

    `weights` are all parameters and buffers; those that are True (not biases) are the ones to put the flops to.
    """
    flops = {weight: 0 for weight, counts in weights.items() if counts}
    _add_flops(gm, {weight: weight if counts else None for weight, counts in weights.items()}, matched, flops)
    return flops


def _add_flops(
    module: GraphModule,
    origins: dict[Node, Node | None],
    matched: Collection[Node],
    flops: dict[Node, int],
    times: int = 1,
) -> None:
    """`origins`: each node that is computed from parameters alone -> a weight among them, if there is one."""
    for node in module.graph.nodes:
        inputs = _read(node)
        sources = [origins[source] for source in inputs if source in origins]
        if not sources or node.op == "output":
            continue
        if (inside := sub_graphs(module, node)) is not None:
            for body in inside.bodies:
                known = zip(placeholders(body), inside.operands, strict=False)
                within = {inner: origins[operand] for inner, operand in known if operand in origins}
                _add_flops(body, within, matched, flops, times * inside.times)
            continue
        origin = next((source for source in sources if source is not None), None)
        if len(sources) == len(inputs):
            origins[node] = origin
        if node not in matched and origin is not None:
            flops[origin] += times * flops_of(node)


def _read(node: Node) -> list[Node]:
    """What a node reads numbers from; of matrices that an index picks, the matrices: they are a weight as before."""
    inputs = [source for source in node.all_input_nodes if not only_looks(node, source)]
    if is_call(node, (operator.getitem, torch.index_select), "index_select"):
        value = value_of(node.args[0])
        return inputs[:1] if value is not None and value.dim() > 2 else inputs
    return inputs


def flops_of(node: Node) -> int:
    """What torch's counter says of one node, for the sizes seen while tracing. Attention has no weight, whatever is in
    the place of its queries.
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
    return int(counter.get_total_flops())


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
