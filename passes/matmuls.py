"""The matmuls among the uses of one weight: what each multiplies, and which part of the weight with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
from torch.fx import Node

from pixelfly_compiler.passes.experts import selected
from pixelfly_compiler.passes.flops import hint
from pixelfly_compiler.passes.forms import operands_of
from pixelfly_compiler.passes.operands import Operands
from pixelfly_compiler.passes.regions import Copies, Layout, Region
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.sites import Match
from pixelfly_compiler.passes.weights import Use, value_of


def matmuls(uses: Sequence[Use], name: str, shape: Sequence[int], scopes: Scopes) -> tuple[list[Match], list[Use]]:
    """Those of the uses of a weight that are matmuls with it, and the others.

    What takes the weight twice multiplies it with itself, unless a part of it is the bias. Inside of torch.func's grad
    our operators have no gradient. Of a tensor that gets another shape in place it is not known what it was at the
    matmul.
    """
    matches: list[Match] = []
    others: list[Use] = []
    for use in uses:
        possible = _is_weight_alone(use, uses) and use.user not in scopes.differentiated and not scopes.is_reshaped(use)
        match = _match(use, name, shape, scopes) if possible and use.reaches(scopes.without_gradients) else None
        matches += [match] if match else []
        others += [] if match else [use]
    return matches, others


def _is_weight_alone(use: Use, uses: Sequence[Use]) -> bool:
    """Does nothing else of the same weight reach this node, but as its bias?"""
    beside = [other.operand for other in uses if other.user is use.user and other is not use]
    if not beside:
        return True
    operands = operands_of(use.user, use.operand)
    return operands is not None and all(operand is operands.bias for operand in beside)


def _match(use: Use, name: str, shape: Sequence[int], scopes: Scopes) -> Match | None:
    """The matmul that this use of a weight is, if it is one."""
    operands, out = operands_of(use.user, use.operand), value_of(use.user)
    if operands is None or out is None or out.is_nested:
        return None
    terms = (node for node in operands.given if (value := value_of(node)) is not None and value.is_floating_point())
    if not scopes.is_of_one_type(use.user, (operands.x, use.operand, operands.bias, operands.addend, *terms)):
        return None
    if use.selection is not None and operands.apart is not None:
        operands = operands.apart()
    matrix = None if operands is None else _matrix(operands, use)
    if operands is not None and matrix is not None and use.selection is not None:
        operands = selected(operands, use.selection, matrix)
        matrix = use.selection.all_of(replace(matrix, dims=matrix.dims[-2:]))
    elif matrix is not None and _is_expanded(matrix, shape):
        matrix = replace(matrix, dims=matrix.dims[1:])
    if operands is None or matrix is None or len(matrix.dims) not in (2, 3):
        return None
    if 0 in matrix.shape and 0 not in shape:  # an empty slice
        return None
    region = Region.of(matrix)
    out_features, in_features = matrix.shape[-2:]
    bias, addend = (term if isinstance(term, Node) else None for term in (operands.bias, operands.addend))
    sizes = (use.times, *scopes.hidden.get(use.user, ()), *out.shape)
    return Match(
        site=name + region.label(shape),
        parameter=name,
        module=use.module,
        node=use.user,
        x=operands.x,  # type: ignore[arg-type]  # `operands_of` has seen that it is a node
        weight=use.operand,
        transposed=matrix.is_flipped,
        operands=operands,
        out_features=out_features,
        in_features=in_features,
        region=None if region.is_all_of(shape) else region,
        matrices=matrix.shape[0] if len(matrix.dims) == 3 else None,
        bias=bias,
        addend=addend,
        rows=math.prod(map(hint, sizes)) // max(out_features, 1),
        rows_expr=str(sympy.prod(list(map(_expression, sizes))) / max(out_features, 1)),
        dtype=out.dtype,
    )


def _matrix(operands: Operands, use: Use) -> Layout | None:
    """Where the weight as (out, in) lies in the parameter; None if it does not."""
    try:
        with Copies(use.view, use.origin) as copies:
            matrix = operands.matrix(use.view)
    except (RuntimeError, IndexError):
        return None
    return Layout.of(matrix).within(copies.origin(matrix)) if copies.shows(matrix) else None


def _is_expanded(matrix: Layout, shape: Sequence[int]) -> bool:
    """Are these several matrices only one, which all rows meet?"""
    if len(matrix.dims) != 3:
        return False
    return all(stride == 0 for _, stride in matrix.dims[0]) or (len(shape) == 2 and matrix.shape[0] == 1)


def _expression(size: object) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))  # type: ignore[call-overload]
