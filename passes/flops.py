"""What the matmuls of a graph cost that are no sites: convolutions, batched weights, weights computed from others.

With them the plan's dense flops are those of `torch.utils.flop_counter` on the model, less attention, which has no
weight.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.scopes import Hidden
from pixelfly_compiler.passes.weights import (
    SubGraphs,
    arguments,
    called,
    is_call,
    is_cast,
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
    """Weight -> flops of the operations with it, with rows of it that an index picks, or with what is computed from
    weights alone, that no match covers.

    `weights` are all parameters, which are True, and buffers. Of several parameters that something is computed from,
    the largest has the flops.
    """
    flops = {weight: 0 for weight, counts in weights.items() if counts}
    _add_flops(gm, _Known({w: w if counts else None for w, counts in weights.items()}), matched, hidden, flops)
    return flops


@dataclass(frozen=True)
class _Known:
    """What is known of the nodes of a graph.

    `origins`: each node that is computed from parameters, buffers and constants alone -> a weight among them, if there
    is one. What a matmul or a lookup makes of a constant, such as positions, is none of these. `picked`: what shows
    rows of a weight that an index picked -> that weight. `blank`: memory that nothing has been written to. `mixed`: the
    storages that data has been written to.
    """

    origins: dict[Node, Node | None]
    picked: dict[Node, Node] = field(default_factory=dict)
    constants: set[Node] = field(default_factory=set)
    blank: set[Node] = field(default_factory=set)
    mixed: set[int] = field(default_factory=set)

    def inside(self, body: GraphModule, operands: Sequence[object]) -> _Known:
        """The same of the placeholders of a body, which stand for these operands."""
        known = [(inner, of) for inner, of in zip(placeholders(body), operands, strict=False) if isinstance(of, Node)]
        origins = {inner: self.origins[of] for inner, of in known if of in self.origins}
        return _Known(origins, {inner: self.picked[of] for inner, of in known if of in self.picked})

    def write(self, node: Node, origin: Node | None, is_data: bool) -> None:
        """What this node writes to, and what that is a view of, is from then on what is written. Not what it is a view
        of, where data has been written to another part of that.
        """
        first, is_constant = _written(node), node in self.constants
        written, memory = first, memory_of(first)
        self.mixed.update(memory if is_data else ())
        while isinstance(written, Node) and written.op.startswith("call"):
            self.blank.discard(written)
            if is_data:
                self.origins.pop(written, None)
            elif written is first or memory.isdisjoint(self.mixed):
                self.origins[written] = origin or self.origins.get(written)
            if is_constant:
                self.constants.add(written)
            written = next((source for source in written.all_input_nodes[:1] if memory & memory_of(source)), None)

    def pick(self, node: Node, rows: Node | None) -> None:
        """See whether the node picks rows of a weight, or shows such `rows`."""
        table = _table_of(node)
        weight = rows if _shows(node) else None if table is None else self.origins.get(table)
        if weight is not None:
            self.picked[node] = weight


def _add_flops(
    module: GraphModule,
    known: _Known,
    matched: Collection[Node],
    hidden: Hidden,
    flops: dict[Node, int],
    times: int = 1,
) -> None:
    origins, constants, blank = known.origins, known.constants, known.blank
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if _is_blank(node, blank):
            blank.add(node)
            continue
        writes = may_write(node) and not isinstance(node.target, HigherOrderOperator)
        inputs = [source for source in _read(node) if not (writes and source in blank and source is _written(node))]
        sources = [origins[source] for source in inputs if source in origins]
        rows = next((known.picked[source] for source in inputs if source in known.picked), None)
        known.pick(node, rows)
        if not (sources or rows or writes or (not inputs and _is_constant(node))):
            continue
        weights = (source for source in sources if source is not None)
        origin = max(weights, key=lambda weight: weight.meta["example_value"].numel(), default=None)
        is_data = len(sources) < len(inputs) or (constants.issuperset(inputs) and _is_random(node))
        if not is_data:
            if constants.issuperset(inputs):
                constants.add(node)
            uses_weight = node in matched or is_call(node, (F.embedding, torch.embedding))
            if not uses_weight or constants.isdisjoint(inputs):
                origins[node] = origin
        if writes:
            known.write(node, origin, is_data)
        if (inside := _bodies(module, node)) is not None:
            for body in inside.bodies:
                _add_flops(
                    body, known.inside(body, inside.operands), matched, hidden, flops, times * hint(inside.times)
                )
        elif node not in matched and (counted := origin or rows) is not None:
            flops[counted] += times * flops_of(node, hidden)


def _written(node: Node) -> object:
    return node.kwargs.get("out", next(iter(node.args), None))


def _is_blank(node: Node, blank: Collection[Node]) -> bool:
    """Is this new memory as it is, or a view of such?"""
    if "empty" in called(node):
        return True
    first = next(iter(node.all_input_nodes), None)
    return first in blank and not may_write(node) and bool(memory_of(first) & memory_of(node))


def _table_of(node: Node) -> Node | None:
    """The matrix of which this node picks rows by an index, if it does."""
    operands = [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, Node)]
    if is_call(node, (operator.getitem, torch.index_select, F.embedding, torch.embedding), "index_select"):
        tables = (o for o in operands if (value := value_of(o)) is not None and value.is_floating_point())
        table = next(tables, None)
        return table if table is not None and len(operands) > 1 and table.meta["example_value"].dim() == 2 else None
    return None


_SHOWING = ("contiguous", "clone", "reshape", "flatten")


def _shows(node: Node) -> bool:
    """Has what this node computes the elements of the only thing that it takes, in another shape or type?"""
    if len(node.all_input_nodes) != 1 or may_write(node):
        return False
    shared = memory_of(node) & memory_of(node.all_input_nodes[0])
    return bool(shared) or is_cast(node) or called(node) in _SHOWING


_PICKING = (operator.getitem, torch.index_select, torch.gather, torch.take_along_dim)


def _read(node: Node) -> list[Node]:
    """What a node reads numbers from; of matrices that an index picks, the matrices: they are a weight as before."""
    inputs = [source for source in node.all_input_nodes if _has_numbers(source) and not only_looks(node, source)]
    if is_call(node, _PICKING, *(function.__name__ for function in _PICKING)):
        (source,) = arguments(node, ("input",))
        value = value_of(source)
        return [source] if value is not None and value.dim() > 2 else inputs
    return inputs


def _has_numbers(node: Node) -> bool:
    """Not a size, and not the body of a higher-order operator."""
    value = node.meta.get("example_value")
    return not (isinstance(value, torch.SymInt) or (value is None and node.op == "get_attr"))


def _is_constant(node: Node) -> bool:
    """Is this tensor, made of no other, the same in each call: zeros, a range, a mask?"""
    return value_of(node) is not None and not _is_random(node)


def _is_random(node: Node) -> bool:
    """Are its numbers others in each call?"""
    return is_tagged(node, torch.Tag.nondeterministic_seeded)


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
