"""What lowerings ask of an operator's operands in Inductor's IR, and the memory layout that the templates read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.virtualized import V


def row_major(x: TensorBox) -> TensorBox:
    """x (rows, columns) in memory with neighbouring columns and a static leading dimension; copied only if needed."""
    x = ir.ExternKernel.realize_input(x)
    if isinstance(x.get_layout(), ir.FlexibleLayout):
        x.freeze_layout()
    leading, unit = x.get_stride()
    return x if unit == 1 and isinstance(leading, (int, sympy.Integer)) else ir.ExternKernel.require_contiguous(x)


def contiguous(x: TensorBox) -> TensorBox:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def empty(like: TensorBox, size: Sequence[Any], dtype: torch.dtype | None = None) -> TensorBox:
    """An uninitialised tensor on the device of another, and of its dtype if none is given."""
    # Not imported above: Inductor's own import order, another one is circular.
    from torch._inductor.lowering import lowerings

    made: TensorBox = lowerings[torch.ops.aten.empty.memory_format](
        list(size), dtype=dtype or like.get_dtype(), device=like.get_device(), layout=torch.strided
    )
    return made


def is_static(*sizes: Any) -> bool:
    return all(isinstance(size, (int, sympy.Integer)) for size in sizes)


def are_int32(ends: TensorBox | None) -> bool:
    """Are these ends of groups of rows, if there are any, as templates read them?"""
    return ends is None or ends.get_dtype() == torch.int32


def is_read(output: int) -> bool:
    """Is this output of the operator that is being lowered used at all?"""
    node = V.graph.current_node
    return any(user.target is not operator.getitem or user.args[1] == output for user in node.users)
