"""Operands of a template in Inductor's IR, in the memory layout that the templates read."""

from __future__ import annotations

from typing import Any

import sympy
from torch._inductor import ir
from torch._inductor.ir import TensorBox


def row_major(x: TensorBox) -> TensorBox:
    """x (rows, columns) in memory with neighbouring columns and a static leading dimension; copied only if needed."""
    x = ir.ExternKernel.realize_input(x)
    if isinstance(x.get_layout(), ir.FlexibleLayout):
        x.freeze_layout()
    leading, unit = x.get_stride()
    return x if unit == 1 and isinstance(leading, (int, sympy.Integer)) else ir.ExternKernel.require_contiguous(x)


def contiguous(x: TensorBox) -> TensorBox:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def is_static(*sizes: Any) -> bool:
    return all(isinstance(size, (int, sympy.Integer)) for size in sizes)
