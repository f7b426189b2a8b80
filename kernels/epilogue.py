"""What Inductor has fused behind a product, and the registers that it asks for: known when code is written, not before.

y = linear(x, ...); z = exp(y) * up    ->    reads up, evaluates exp, stores z, and y if the backward needs it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._inductor.virtualized import V
from torch.fx import Node
from torch.fx.node import map_arg

# Registers of a function, per output. Sines of large arguments are behind branches, and all else is kept over those:
# ptxas 12.9, with Triton 3.6, spills it for Blackwell rather than take more than half of the registers.
_FUNCTIONS = {
    **dict.fromkeys(("erf", "exp", "exp2", "expm1", "log", "log1p", "log2", "sigmoid", "tanh"), 0.5),
    "pow": 1.0,
    **dict.fromkeys(("cos", "sin", "tan"), 2.5),
    **dict.fromkeys(("rand", "randn"), 3.0),
}


def epilogue_weight(product: Any) -> float:
    """The registers that the epilogue of the product, a template's output, asks for, per output of it: one for each
    value that it reads or stores, two for one of 8 bytes; half of one for a product in fp32; and those of functions.
    """
    fused = V.graph.scheduler.name_to_fused_node[product.get_operation_name()]
    epilogue = [node for node in fused.get_nodes() if node.node is not product]
    reads = {read for node in epilogue for read in node.read_writes.reads if read.name not in fused.get_buffer_names()}
    kept = product.get_dtype().itemsize // 4 * 0.5
    return kept + _stored(fused) + sum(map(_registers, reads)) + _evaluated(epilogue)


def _stored(fused: Any) -> int:
    """How many values are used outside of the kernel."""
    inside = fused.get_operation_names()
    return sum(any(user.get_name() not in inside for user in buffer.users) for buffer in fused.get_outputs())


def _registers(read: Any) -> int:
    """None for one number; none for those of 2 bytes that all rows share, of which a thread holds two in a register."""
    size = V.graph.get_dtype(read.name).itemsize
    *rows, column = read.var_names or [None]
    per_row = read.is_indirect() or not read.index.free_symbols.isdisjoint(rows or [column])
    if per_row:
        return max(size // 4, 1)
    return size // 4 if column in read.index.free_symbols else 0


def _evaluated(epilogue: Sequence[Any]) -> float:
    """Of the functions, each counted once for the same values, as kernels evaluate them: equal ones get one number."""
    known: dict[str, int] = {}
    weights: dict[int, float] = {}
    for node in epilogue:
        numbers: dict[Node, int] = {}
        for step in node._body.root_block.graph.nodes:
            at = node._body.indexing_exprs[step.args[0]] if step.target == "get_index" else None
            key = repr((step.target, map_arg((step.args, step.kwargs), numbers.__getitem__), at))
            numbers[step] = known.setdefault(key, len(known))
            weights[numbers[step]] = _FUNCTIONS.get(step.target, 0.0)
    return sum(weights.values())
