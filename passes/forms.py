"""The ways to write a matmul with a weight: `PATTERNS`, one function each.

A pattern reads one node of the graph and says which of its arguments is what, as `Operands`, so that the node is

    leave(enter(x) @ matrix(weight).T + bias)

It returns None for what it does not know. Products of two matrices are here, what takes more to explain in a module of
its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from pixelfly_compiler.passes.contractions import batched, contraction, einsum, tensordot
from pixelfly_compiler.passes.convolutions import convolution, transposed_convolution
from pixelfly_compiler.passes.experts import grouped_mm
from pixelfly_compiler.passes.operands import Operands, Step, of_first, same, shape_of, transpose
from pixelfly_compiler.passes.weights import arguments, is_call, may_write, value_of


def _linear(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, (F.linear, torch._C._nn.linear)):
        return None
    x, weight, bias = arguments(node, ("input", "weight", "bias"))
    return Operands(x, weight, bias)


def _addmm(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, (torch.addmm,), "addmm"):
        return None
    term, left, right = arguments(node, ("input", "mat1", "mat2"))
    if left is operand:
        return _plus(node, term, Operands(right, left, enter=transpose, leave=transpose))
    value = value_of(term)
    if value is not None and value.dim() == 1 and value.shape[0] == shape_of(right)[1] and _factors(node) == (1, 1):
        return Operands(left, right, term, matrix=transpose)
    return _plus(node, term, Operands(left, right, matrix=transpose))


def _addmv(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, (torch.addmv,), "addmv"):
        return None
    term, matrix, vector = arguments(node, ("input", "mat", "vec"))
    return _plus(node, term, Operands(vector, matrix))


_MATMULS = (torch.mm, torch.matmul, torch.linalg.matmul, operator.matmul, torch.mv)


def _matmul(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, _MATMULS, "mm", "matmul", "__matmul__", "mv"):
        return None
    left, right = arguments(node, ("input", "other"))
    right = node.kwargs.get("mat2", node.kwargs.get("vec", right))
    if left is None or right is None:
        return None
    if len(shape_of(operand)) > 2:
        return batched(left, right, operand)
    if right is operand:
        return Operands(left, right, matrix=transpose)
    turn = same if len(shape_of(right)) == 1 else transpose
    return Operands(right, left, enter=turn, leave=turn)


def _bmm(node: Node, operand: Node) -> Operands | None:
    if is_call(node, (torch.bmm,), "bmm"):
        left, right = arguments(node, ("input", "mat2"))
        return batched(left, right, operand)
    term, left, right = arguments(node, ("input", "batch1", "batch2"))
    if operand is not left and operand is not right:
        return None
    if is_call(node, (torch.baddbmm,), "baddbmm"):
        return _plus(node, term, batched(left, right, operand))
    if is_call(node, (torch.addbmm,), "addbmm"):  # the sum of the products
        x, letters = (left, ("bnk", "bkm")) if right is operand else (right, ("bkm", "bnk"))
        return _plus(node, term, contraction(x, operand, *letters, "nm"))
    return None


def _plus(node: Node, term: object, operands: Operands | None) -> Operands | None:
    """`beta * term + alpha * product`, as PyTorch's operations that add to a product mean it."""
    beta, alpha = _factors(node)
    if operands is None or not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        return None
    if not isinstance(term, Node):  # named, or in a place, that only other versions of the operation know
        return None
    if beta == alpha == 1:
        return replace(operands, addend=term)
    return replace(
        operands,
        enter=partial(of_first, step=operands.enter),
        leave=partial(_scaled, leave=operands.leave, alpha=alpha, beta=beta),
        given=(term,),
    )


def _factors(node: Node) -> tuple[object, object]:
    return node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)


def _scaled(y: Any, term: Any, leave: Step, alpha: float, beta: float) -> Any:
    product = leave(y) * alpha
    if beta:
        return product + term.type_as(product) * beta
    return product + term.flatten()[:0].sum()  # not even a NaN of the term counts, and its gradients are zeros


PATTERNS: tuple[Callable[[Node, Node], Operands | None], ...] = (
    _linear,
    _addmm,
    _addmv,
    _matmul,
    _bmm,
    grouped_mm,
    einsum,
    tensordot,
    convolution,
    transposed_convolution,
)


def operands_of(node: Node, operand: Node) -> Operands | None:
    """The matmul that `node` is with `operand` as its weight, if it is one. One that writes to `out` is none."""
    if may_write(node):
        return None
    for pattern in PATTERNS:
        operands = pattern(node, operand)
        if operands is not None and operands.weight is operand and is_matmul_of(operands, operand):
            return operands
    return None


def is_matmul_of(operands: Operands, operand: Node) -> bool:
    """Is x known, and the weight nothing else of it?"""
    others = (operands.x, operands.bias, operands.addend, *operands.given)
    return isinstance(operands.x, Node) and value_of(operands.x) is not None and all(o is not operand for o in others)
