"""Matmuls where data says which of several matrices a row meets: groups of rows, and matrices picked by an index."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from pixelfly_compiler.passes.contractions import batched
from pixelfly_compiler.passes.flops import hint
from pixelfly_compiler.passes.operands import Operands, Step, is_one, of_first, same, shape_of, transpose
from pixelfly_compiler.passes.regions import Layout
from pixelfly_compiler.passes.weights import Selection, is_call


def grouped_mm(node: Node, operand: Node) -> Operands | None:
    """The rows of each expert lie one behind the other; `offs` says where they end."""
    functions = (torch._grouped_mm, getattr(torch.nn.functional, "grouped_mm", None))
    # What transformers puts in their place, where torch has none for a dtype.
    if not is_call(node, functions) and not str(node.target).startswith("transformers.grouped_mm_fallback"):
        return None
    given = dict(zip(("x", "weight", "offs", "bias"), node.args, strict=False)) | node.kwargs
    x = given.get("x", given.get("mat_a", given.get("input")))
    weight = given.get("weight", given.get("mat_b", given.get("mat2")))
    offs, others = given.get("offs"), [given.get("bias"), given.get("out_dtype")]
    if weight is not operand or len(shape_of(weight)) != 3 or any(other is not None for other in others):
        return None
    if offs is None:
        return batched(x, weight, operand) if len(shape_of(x)) == 3 else None
    if len(shape_of(x)) != 2 or not isinstance(offs, Node):
        return None
    as_is = partial(of_first, step=same)
    return Operands(x, weight, matrix=transpose, enter=as_is, leave=as_is, given=(offs,), ends=_as_int32)


def _as_int32(_: Any, offs: Any) -> Any:
    return offs.to(torch.int32)


def selected(operands: Operands, selection: Selection, matrix: Layout) -> Operands | None:
    """The operands of a matmul with what an index from data picks, as those of one with all matrices.

    One index, or a list of one: all rows meet the matrix that it picks. Several: the rows are sorted by them.
    """
    is_list = selection.several and len(matrix.dims) == 3
    is_single = len(matrix.dims) == 2 and (not selection.several or is_one(shape_of(selection.index)[0]))
    if operands.given or not (is_single or (is_list and _are_the_picked(operands, selection, matrix))):
        return None
    if is_list:
        return replace(
            operands,
            enter=partial(_sorted, enter=operands.enter, matrices=selection.count, once=operands.once),
            leave=partial(_unsorted, leave=operands.leave, matrices=selection.count),
            given=(selection.index,),
            ends=partial(_ends_by_index, matrices=selection.count, width=matrix.shape[-1]),
        )
    return replace(
        operands,
        enter=partial(of_first, step=operands.enter),
        leave=partial(of_first, step=operands.leave),
        given=(selection.index,),
        ends=partial(_all_in_one, matrices=selection.count, width=matrix.shape[-1]),
    )


def _are_the_picked(operands: Operands, selection: Selection, matrix: Layout) -> bool:
    """Are the matrices all that the list picks, in its order? Of the first of these, `matrix` is the layout."""
    weight = torch.empty([hint(size) for size in shape_of(operands.weight)], device="meta")
    picked = hint(shape_of(selection.index)[0])
    return matrix.shape[0] == 1 and tuple(operands.matrix(weight).shape) == (picked, *matrix.shape[1:])


def _all_in_one(x: Any, index: Any, matrices: int, width: int) -> Any:
    numbers = x.new_ones(matrices, dtype=torch.int32).cumsum(0)  # 1, 2, ...
    return ((numbers > index.remainder(matrices)) * (x.numel() // width)).to(torch.int32)


def _sorted(x: Any, index: Any, enter: Step, matrices: int, once: bool) -> Any:
    order = _order(index, matrices)
    return enter(x).index_select(0, order * 0 if once else order)


def _unsorted(y: Any, index: Any, leave: Step, matrices: int) -> Any:
    return leave(y.index_select(0, _order(index, matrices).argsort()))


def _order(index: Any, matrices: int) -> Any:
    return index.remainder(matrices).argsort(stable=True)  # negative ones count from the end


def _ends_by_index(x: Any, index: Any, matrices: int, width: int) -> Any:
    numbers = index.new_ones(matrices).cumsum(0)
    before = (index.remainder(matrices).unsqueeze(0) < numbers.unsqueeze(1)).sum(1)
    return (before * (x.flatten(1).shape[1] // width)).to(torch.int32)  # there may be no index, so of what one meets
