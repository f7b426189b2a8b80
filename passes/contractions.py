"""Patterns of contractions: letters say which dimensions are summed, which stay, and which count matrices.

`einsum` as it is written; `tensordot`, `inner` and products of stacks of matrices as the einsum that they are.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from pixelfly_compiler.passes.operands import Operands, Step, is_one, shape_of
from pixelfly_compiler.passes.weights import arguments, is_call, value_of


def einsum(node: Node, operand: Node) -> Operands | None:
    """Two operands and no letter that only one of them has. What both keep counts the matrices of the weight."""
    operands = einsum_operands(node)
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    place = 1 if operands[1] is operand else 0
    x, weight = operands[1 - place], operands[place]
    letters = _letters(str(node.args[0]).replace(" ", ""), [len(shape_of(argument)) for argument in operands])
    return None if letters is None else contraction(x, weight, letters[1 - place], letters[place], letters[2])


def einsum_operands(node: Node) -> Sequence[Any]:
    """The operands of an `einsum` whose equation is text; none of any other node."""
    if not is_call(node, (torch.einsum,)) or not isinstance(node.args[0], str):
        return ()
    operands = list(node.args[1:])
    return operands[0] if isinstance(operands[0], tuple | list) else operands


def _letters(equation: str, dims: Sequence[int]) -> list[str] | None:
    """The letters of both operands and of the result; an ellipsis becomes Greek. None if one is repeated."""
    inputs, arrow, result = equation.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        return None
    if not arrow:
        once = sorted(letter for letter in inputs if letter.isalpha() and inputs.count(letter) == 1)
        result = "".join(["..." if "..." in inputs else "", *once])
    more = [dim - len(part) + 3 if "..." in part else 0 for part, dim in zip(parts, dims, strict=True)]
    greek = "".join(chr(0x3B1 + i) for i in range(max(more)))
    parts = [
        part.replace("...", greek[max(more) - n :])
        for part, n in zip((*parts, result), (*more, max(more)), strict=True)
    ]
    return None if any(len(set(part)) < len(part) for part in parts) else parts


def tensordot(node: Node, operand: Node) -> Operands | None:
    """Also `inner`, which contracts the last dimensions of both."""
    if is_call(node, (torch.inner,), "inner"):
        left, right = arguments(node, ("input", "other"))
        dims: Any = ([-1], [-1])
    elif is_call(node, (torch.tensordot,)):
        left, right, dims = arguments(node, ("a", "b", "dims"))
        dims = node.args[2:] if len(node.args) == 4 else dims  # as exported programs have it
    else:
        return None
    if left is right or not shape_of(left) or not shape_of(right) or isinstance(dims, Node):
        return None
    letters = _letters_of_tensordot(len(shape_of(left)), len(shape_of(right)), 2 if dims is None else dims)
    place = 1 if right is operand else 0
    return contraction((left, right)[1 - place], (left, right)[place], letters[1 - place], letters[place], letters[2])


def _letters_of_tensordot(left: int, right: int, dims: Any) -> tuple[str, str, str]:
    """The letters of both operands, of so many dimensions, and of the result."""
    firsts, seconds = (range(left - dims, left), range(dims)) if isinstance(dims, int) else dims
    of_left, of_right = (string.ascii_letters[:left], list(string.ascii_letters[left : left + right]))
    for first, second in zip(firsts, seconds, strict=True):
        of_right[second] = of_left[first]
    kept = [letter for letter in (*of_left, *of_right) if (letter in of_left) != (letter in of_right)]
    return of_left, "".join(of_right), "".join(kept)


def batched(left: Any, right: Any, operand: Node) -> Operands | None:
    """A product with several matrices, (..., in, out) on the right or (..., out, in) on the left."""
    turn = left is operand
    x = right if turn else left
    of_x, of_weight, of_result = ("kr", "nk", "nr") if turn else ("rk", "kn", "rn")
    if len(shape_of(x)) == 1:
        of_x, of_result = "k", "n"
    several = string.ascii_uppercase[: max(len(shape_of(x)), len(shape_of(operand))) - 2]
    of_weight = several[len(several) + 2 - len(shape_of(operand)) :] + of_weight
    return contraction(x, operand, several + of_x, of_weight, several + of_result)


def contraction(
    x: object, weight: object, of_x: str, of_weight: str, of_result: str, join: bool = True
) -> Operands | None:
    """The sum over the letters that x and the weight share, as einsum means it; x may lack its first dimensions, as if
    they were 1 wide.

    A letter that stays, and in which the weight is 1 wide, is x's alone. One that x itself has not, for the graph adds
    it, is the weight's alone: several matrices which all rows meet are one. Without `join` they stay several, as they
    do where x happens to be 1 wide, and x is repeated: not the values decide which matrix it is.
    """
    missing, sizes = len(of_x) - len(shape_of(x)), dict(zip(of_weight, shape_of(weight), strict=True))
    of_x_sizes = dict(zip(of_x, (*(1,) * missing, *shape_of(x)), strict=True))
    of_both = [letter for letter in of_weight if letter in of_x and letter in of_result]
    single = [letter for letter in of_both if is_one(sizes[letter])]
    met_by_all = [
        letter
        for letter in of_both
        if join
        and letter not in single
        and _is_added(x, of_x.index(letter) - len(of_x))
        and not _is_expanded(weight, of_weight.index(letter))
    ]
    wide = {letter: sizes[letter] for letter in of_both if letter not in (*single, *met_by_all)}
    wide = {letter: n for letter, n in wide.items() if is_one(of_x_sizes[letter]) and not is_one(n)}
    picked = [letter for letter, n in wide.items() if not isinstance(n, int)]
    if any(_is_expanded(weight, of_weight.index(letter)) for letter in picked):
        return None
    repeats = {letter: n for letter, n in wide.items() if letter not in picked}
    ready = partial(
        _ready,
        missing=missing,
        sizes=[repeats.get(letter, -1) for letter in of_x] if repeats else [],
        dropped=[of_x.index(letter) for letter in met_by_all],
    )
    kept = partial(_first_of, dims=[of_weight.index(letter) for letter in single])
    product = _product(
        {letter: n for letter, n in (of_x_sizes | wide).items() if letter not in met_by_all},
        {letter: n for letter, n in sizes.items() if letter not in single},
        of_result,
    )
    if product is None:
        return None
    apart = partial(contraction, x, weight, of_x, of_weight, of_result, join=False)
    return replace(
        product,
        x=x,
        weight=weight,
        matrix=partial(_then, first=kept, step=product.matrix),
        enter=partial(_then, first=ready, step=product.enter),
        apart=apart if met_by_all else None,
        once=bool(picked),
    )


def _product(of_x: Mapping[str, Any], of_weight: Mapping[str, Any], of_result: str) -> Operands | None:
    """The same for letters, with their sizes, that mean the same in both."""
    contracted = [letter for letter in of_weight if letter not in of_result]
    matrices = [letter for letter in of_weight if letter in of_result and letter in of_x]
    outs = [letter for letter in of_weight if letter in of_result and letter not in of_x]
    rows = [*matrices, *(letter for letter in of_x if letter in of_result and letter not in matrices)]
    if not contracted or not outs or set(of_x) - set(rows) != set(contracted):
        return None
    if any(isinstance(n, int) and n != of_weight.get(letter, n) for letter, n in of_x.items()):
        return None  # one of them is 1, and broadcast
    places_of_x, places_of_weight = list(of_x), list(of_weight)
    order = [[*rows, *outs].index(letter) for letter in of_result]
    return Operands(
        None,
        None,
        matrix=partial(
            _as_matrix,
            order=[places_of_weight.index(letter) for letter in matrices + outs + contracted],
            matrices=len(matrices),
            rows=len(outs),
        ),
        enter=partial(_last, order=[places_of_x.index(letter) for letter in rows + contracted], count=len(contracted)),
        leave=partial(_spread, sizes=[of_weight[letter] for letter in outs], order=order),
    )


def _is_added(x: object, dim: int) -> bool:
    """Does the graph add this dimension, counted from the end, whatever the sizes: has x none at that place, or one of
    `unsqueeze` or of None in an index, expanded or not?
    """
    dims = len(shape_of(x))
    if dim < -dims or not isinstance(x, Node):
        return dim < -dims
    if is_call(x, (torch.unsqueeze,), "unsqueeze"):
        source, place = arguments(x, ("input", "dim"))
        place -= dims if place >= 0 else 0
        return place == dim or _is_added(source, dim + 1 if dim < place else dim)
    if is_call(x, (torch.broadcast_to,), "expand", "broadcast_to"):
        return _is_added(arguments(x, ("input",))[0], dim)
    if is_call(x, (operator.getitem,)) and isinstance(x.args[0], Node):
        items = list(x.args[1]) if isinstance(x.args[1], tuple) else [x.args[1]]
        if any(item not in (None, ..., slice(None)) for item in items):
            return False
        place = items.index(...) if ... in items else len(items)
        items[place : place + 1] = [slice(None)] * (dims - len(items) + (... in items))
        return items[dim] is None
    return False


def _is_expanded(weight: object, dim: int) -> bool:
    value = value_of(weight)
    if value is None or value.layout is not torch.strided:
        return False
    return isinstance(value.stride(dim), int) and value.stride(dim) == 0


def _then(x: Any, first: Step, step: Step) -> Any:
    return step(first(x))


def _ready(x: Any, missing: int, sizes: Sequence[int], dropped: Sequence[int]) -> Any:
    """x with the dimensions that it lacks, those repeated that have a size, and without those that the graph adds."""
    for _ in range(missing):
        x = x.unsqueeze(0)
    return _first_of(x.expand(*sizes) if sizes else x, dropped)


def _first_of(x: Any, dims: Sequence[int]) -> Any:
    """x without these dimensions: what it is at their first places."""
    for dim in sorted(dims, reverse=True):
        x = x.select(dim, 0)
    return x


def _as_matrix(weight: Any, order: Sequence[int], matrices: int, rows: int) -> Any:
    turned = weight.permute(order)
    turned = turned.flatten(0, matrices - 1) if matrices else turned
    first = 1 if matrices else 0
    return turned.flatten(first, first + rows - 1).flatten(first + 1)


def _last(x: Any, order: Sequence[int], count: int) -> Any:
    """The last `count` dimensions in this order become one."""
    moved = x if list(order) == sorted(order) else x.permute(order)
    return moved.flatten(-count) if count > 1 else moved


def _spread(y: Any, sizes: Sequence[int], order: Sequence[int]) -> Any:
    split = y.unflatten(-1, tuple(sizes)) if len(sizes) > 1 else y
    return split if list(order) == sorted(order) else split.permute(order)
