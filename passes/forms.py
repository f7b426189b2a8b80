"""The ways to write a matmul with a weight: `PATTERNS`, one function each.

A pattern reads one node of the graph and says which of its arguments is what, so that the node is

    leave(enter(x) @ matrix(weight).T + bias)

`matrix` gives the weight as (out, in), without copying; `enter` moves what is contracted to the last dimension of x,
`leave` moves the last dimension, `out`, to where the node has it. All three are plain functions of a tensor: a rewrite
traces them into the graph (so a method takes its arguments as torch's function of that name does), a test calls them. A
pattern returns None for what it does not know.

A weight may hold several matrices, as those of experts: then `matrix` gives (matrices, out, in), and `enter` brings x
into an order in which the rows that meet the same matrix are neighbours. `ends` says where those of each matrix end.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from pixelfly_compiler.passes.flops import hint
from pixelfly_compiler.passes.regions import Layout
from pixelfly_compiler.passes.weights import Selection, is_call, may_write, value_of

Step = Callable[..., Any]  # of a tensor, or of a proxy for one


def same(x: Any) -> Any:
    return x


def transpose(x: Any) -> Any:
    return x.transpose(-1, -2)


@dataclass(frozen=True)
class Operands:
    """A node's arguments in their parts. `addend` is added to what `leave` returns.

    `given` are nodes that `enter`, `leave` and `ends` take behind the tensor. `ends(enter(x, *given), *given)` is
    (matrices,) int32; without it each matrix meets as many rows. `apart`, if there is one: the same, where several
    matrices are joined to one since all rows meet them, without joining them.
    """

    x: object
    weight: object
    bias: object = None
    addend: object = None
    matrix: Step = same
    enter: Step = same
    leave: Step = same
    given: tuple[Node, ...] = ()
    ends: Step | None = None
    apart: Callable[[], Operands | None] | None = None


def _linear(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, (F.linear, torch._C._nn.linear)):
        return None
    x, weight, bias = _arguments(node, ("input", "weight", "bias"))
    return Operands(x, weight, bias)


def _addmm(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, (torch.addmm,), "addmm"):
        return None
    term, left, right = _arguments(node, ("input", "mat1", "mat2"))
    if left is operand:
        return _plus(node, term, Operands(right, left, enter=transpose, leave=transpose))
    value = value_of(term)
    if value is not None and value.dim() == 1 and value.shape[0] == _shape(right)[1] and _factors(node) == (1, 1):
        return Operands(left, right, term, matrix=transpose)
    return _plus(node, term, Operands(left, right, matrix=transpose))


def _addmv(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, (torch.addmv,), "addmv"):
        return None
    term, matrix, vector = _arguments(node, ("input", "mat", "vec"))
    return _plus(node, term, Operands(vector, matrix))


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
        enter=partial(_of_first, step=operands.enter),
        leave=partial(_scaled, leave=operands.leave, alpha=alpha, beta=beta),
        given=(term,),
    )


def _factors(node: Node) -> tuple[object, object]:
    return node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)


def _of_first(x: Any, _: Any, step: Step) -> Any:
    return step(x)


def _scaled(y: Any, term: Any, leave: Step, alpha: float, beta: float) -> Any:
    product = leave(y) * alpha
    if beta:
        return product + term.type_as(product) * beta
    return product + term.flatten()[:0].sum()  # not even a NaN of the term counts, and its gradients are zeros


_MATMULS = (torch.mm, torch.matmul, torch.linalg.matmul, operator.matmul, torch.mv)


def _matmul(node: Node, operand: Node) -> Operands | None:
    if not is_call(node, _MATMULS, "mm", "matmul", "__matmul__", "mv"):
        return None
    left, right = _arguments(node, ("input", "other"))
    right = node.kwargs.get("mat2", node.kwargs.get("vec", right))
    if left is None or right is None:
        return None
    if len(_shape(operand)) > 2:
        return _batched(left, right, operand)
    if right is operand:
        return Operands(left, right, matrix=transpose)
    turn = same if len(_shape(right)) == 1 else transpose
    return Operands(right, left, enter=turn, leave=turn)


def _batched(left: Any, right: Any, operand: Node) -> Operands | None:
    """A product with several matrices, (..., in, out) on the right or (..., out, in) on the left."""
    turn = left is operand
    x = right if turn else left
    of_x, of_weight, of_result = ("kr", "nk", "nr") if turn else ("rk", "kn", "rn")
    if len(_shape(x)) == 1:
        of_x, of_result = "k", "n"
    several = string.ascii_uppercase[: max(len(_shape(x)), len(_shape(operand))) - 2]
    of_weight = several[len(several) + 2 - len(_shape(operand)) :] + of_weight
    return _contraction(x, operand, several + of_x, of_weight, several + of_result)


def _bmm(node: Node, operand: Node) -> Operands | None:
    if is_call(node, (torch.bmm,), "bmm"):
        left, right = _arguments(node, ("input", "mat2"))
        return _batched(left, right, operand)
    term, left, right = _arguments(node, ("input", "batch1", "batch2"))
    if operand is not left and operand is not right:
        return None
    if is_call(node, (torch.baddbmm,), "baddbmm"):
        return _plus(node, term, _batched(left, right, operand))
    if is_call(node, (torch.addbmm,), "addbmm"):  # the sum of the products
        x, letters = (left, ("bnk", "bkm")) if right is operand else (right, ("bkm", "bnk"))
        return _plus(node, term, _contraction(x, operand, *letters, "nm"))
    return None


def _grouped_mm(node: Node, operand: Node) -> Operands | None:
    """The rows of each expert lie one behind the other; `offs` says where they end."""
    functions = (torch._grouped_mm, getattr(torch.nn.functional, "grouped_mm", None))
    # What transformers puts in their place, where torch has none for a dtype.
    if not is_call(node, functions) and not str(node.target).startswith("transformers.grouped_mm_fallback"):
        return None
    given = dict(zip(("x", "weight", "offs", "bias"), node.args, strict=False)) | node.kwargs
    x = given.get("x", given.get("mat_a", given.get("input")))
    weight = given.get("weight", given.get("mat_b", given.get("mat2")))
    offs, others = given.get("offs"), [given.get("bias"), given.get("out_dtype")]
    if weight is not operand or len(_shape(weight)) != 3 or any(other is not None for other in others):
        return None
    if offs is None:
        return _batched(x, weight, operand) if len(_shape(x)) == 3 else None
    if len(_shape(x)) != 2 or not isinstance(offs, Node):
        return None
    return Operands(x, weight, matrix=transpose, enter=_first, leave=_first, given=(offs,), ends=_as_int32)


def _first(x: Any, _: Any) -> Any:
    return x


def _as_int32(_: Any, offs: Any) -> Any:
    return offs.to(torch.int32)


def selected(operands: Operands, selection: Selection, matrix: Layout) -> Operands | None:
    """The operands of a matmul with what an index from data picks, as those of one with all matrices.

    One index, or a list of one: all rows meet the matrix that it picks. Several: the rows are sorted by them.
    """
    is_list = selection.several and len(matrix.dims) == 3
    is_one = len(matrix.dims) == 2 and (not selection.several or _is_one(_shape(selection.index)[0]))
    if operands.given or not (is_one or (is_list and _are_the_picked(operands, selection, matrix))):
        return None
    if is_list:
        return replace(
            operands,
            enter=partial(_sorted, enter=operands.enter, matrices=selection.count),
            leave=partial(_unsorted, leave=operands.leave, matrices=selection.count),
            given=(selection.index,),
            ends=partial(_ends_by_index, matrices=selection.count, width=matrix.shape[-1]),
        )
    return replace(
        operands,
        enter=partial(_of_first, step=operands.enter),
        leave=partial(_of_first, step=operands.leave),
        given=(selection.index,),
        ends=partial(_all_in_one, matrices=selection.count, width=matrix.shape[-1]),
    )


def _are_the_picked(operands: Operands, selection: Selection, matrix: Layout) -> bool:
    """Are the matrices all that the list picks, in its order? Of the first of these, `matrix` is the layout."""
    weight = torch.empty([hint(size) for size in _shape(operands.weight)], device="meta")
    picked = hint(_shape(selection.index)[0])
    return matrix.shape[0] == 1 and tuple(operands.matrix(weight).shape) == (picked, *matrix.shape[1:])


def _all_in_one(x: Any, index: Any, matrices: int, width: int) -> Any:
    numbers = x.new_ones(matrices, dtype=torch.int32).cumsum(0)  # 1, 2, ...
    return ((numbers > index.remainder(matrices)) * (x.numel() // width)).to(torch.int32)


def _sorted(x: Any, index: Any, enter: Step, matrices: int) -> Any:
    return enter(x).index_select(0, _order(index, matrices))


def _unsorted(y: Any, index: Any, leave: Step, matrices: int) -> Any:
    return leave(y.index_select(0, _order(index, matrices).argsort()))


def _order(index: Any, matrices: int) -> Any:
    return index.remainder(matrices).argsort(stable=True)  # negative ones count from the end


def _ends_by_index(x: Any, index: Any, matrices: int, width: int) -> Any:
    numbers = index.new_ones(matrices).cumsum(0)
    before = (index.remainder(matrices).unsqueeze(0) < numbers.unsqueeze(1)).sum(1)
    return (before * (x.flatten(1).shape[1] // width)).to(torch.int32)  # there may be no index, so of what one meets


def _einsum(node: Node, operand: Node) -> Operands | None:
    """Two operands and no letter that only one of them has. What both keep counts the matrices of the weight."""
    operands = einsum_operands(node)
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    place = 1 if operands[1] is operand else 0
    x, weight = operands[1 - place], operands[place]
    letters = _letters(str(node.args[0]).replace(" ", ""), [len(_shape(argument)) for argument in operands])
    return None if letters is None else _contraction(x, weight, letters[1 - place], letters[place], letters[2])


def einsum_operands(node: Node) -> Sequence[Any]:
    """The operands of an `einsum` whose equation is text; none of any other node."""
    if not is_call(node, (torch.einsum,)) or not isinstance(node.args[0], str):
        return ()
    operands = list(node.args[1:])
    return operands[0] if isinstance(operands[0], tuple | list) else operands


def _contraction(
    x: object, weight: object, of_x: str, of_weight: str, of_result: str, join: bool = True
) -> Operands | None:
    """The sum over the letters that x and the weight share, as einsum means it; x may lack its first dimensions, as if
    they were 1 wide.

    A letter that stays, and in which the weight is 1 wide, is x's alone. One that x itself has not, for the graph adds
    it, is the weight's alone: several matrices which all rows meet are one. Without `join` they stay several, as they
    do where x happens to be 1 wide, and x is repeated: not the values decide which matrix it is.
    """
    missing, sizes = len(of_x) - len(_shape(x)), dict(zip(of_weight, _shape(weight), strict=True))
    of_x_sizes = dict(zip(of_x, (*(1,) * missing, *_shape(x)), strict=True))
    of_both = [letter for letter in of_weight if letter in of_x and letter in of_result]
    single = [letter for letter in of_both if _is_one(sizes[letter])]
    met_by_all = [
        letter
        for letter in of_both
        if join
        and letter not in single
        and _is_added(x, of_x.index(letter) - len(of_x))
        and not _is_expanded(weight, of_weight.index(letter))
    ]
    wide = {letter: sizes[letter] for letter in of_both if letter not in (*single, *met_by_all)}
    wide = {letter: n for letter, n in wide.items() if _is_one(of_x_sizes[letter]) and not _is_one(n)}
    if any(not isinstance(n, int) for n in wide.values()):
        return None
    ready = partial(
        _ready,
        missing=missing,
        sizes=[wide.get(letter, -1) for letter in of_x] if wide else [],
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
    apart = partial(_contraction, x, weight, of_x, of_weight, of_result, join=False)
    return replace(
        product,
        x=x,
        weight=weight,
        matrix=partial(_then, first=kept, step=product.matrix),
        enter=partial(_then, first=ready, step=product.enter),
        apart=apart if met_by_all else None,
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


def _then(x: Any, first: Step, step: Step) -> Any:
    return step(first(x))


def _ready(x: Any, missing: int, sizes: Sequence[int], dropped: Sequence[int]) -> Any:
    """x with the dimensions that it lacks, those repeated that have a size, and without those that the graph adds."""
    for _ in range(missing):
        x = x.unsqueeze(0)
    return _first_of(x.expand(*sizes) if sizes else x, dropped)


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _is_added(x: object, dim: int) -> bool:
    """Does the graph add this dimension, counted from the end, whatever the sizes: has x none at that place, or one of
    `unsqueeze` or of None in an index, expanded or not?
    """
    dims = len(_shape(x))
    if dim < -dims or not isinstance(x, Node):
        return dim < -dims
    if is_call(x, (torch.unsqueeze,), "unsqueeze"):
        source, place = _arguments(x, ("input", "dim"))
        place -= dims if place >= 0 else 0
        return place == dim or _is_added(source, dim + 1 if dim < place else dim)
    if is_call(x, (torch.broadcast_to,), "expand", "broadcast_to"):
        return _is_added(x.args[0], dim)
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


def _tensordot(node: Node, operand: Node) -> Operands | None:
    """Also `inner`, which contracts the last dimensions of both."""
    if is_call(node, (torch.inner,), "inner"):
        left, right = _arguments(node, ("input", "other"))
        dims: Any = ([-1], [-1])
    elif is_call(node, (torch.tensordot,)):
        left, right, dims = _arguments(node, ("a", "b", "dims"))
        dims = node.args[2:] if len(node.args) == 4 else dims  # as exported programs have it
    else:
        return None
    if left is right or not _shape(left) or not _shape(right) or isinstance(dims, Node):
        return None
    letters = _letters_of_tensordot(len(_shape(left)), len(_shape(right)), 2 if dims is None else dims)
    place = 1 if right is operand else 0
    return _contraction((left, right)[1 - place], (left, right)[place], letters[1 - place], letters[place], letters[2])


def _letters_of_tensordot(left: int, right: int, dims: Any) -> tuple[str, str, str]:
    """The letters of both operands, of so many dimensions, and of the result."""
    firsts, seconds = (range(left - dims, left), range(dims)) if isinstance(dims, int) else dims
    of_left, of_right = (string.ascii_letters[:left], list(string.ascii_letters[left : left + right]))
    for first, second in zip(firsts, seconds, strict=True):
        of_right[second] = of_left[first]
    kept = [letter for letter in (*of_left, *of_right) if (letter in of_left) != (letter in of_right)]
    return of_left, "".join(of_right), "".join(kept)


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


def _as_matrix(weight: Any, order: Sequence[int], matrices: int, rows: int) -> Any:
    turned = weight.permute(order)
    turned = turned.flatten(0, matrices - 1) if matrices else turned
    first = 1 if matrices else 0
    return turned.flatten(first, first + rows - 1).flatten(first + 1)


def _first_of(x: Any, dims: Sequence[int]) -> Any:
    """x without these dimensions: what it is at their first places."""
    for dim in sorted(dims, reverse=True):
        x = x.select(dim, 0)
    return x


def _last(x: Any, order: Sequence[int], count: int) -> Any:
    """The last `count` dimensions in this order become one."""
    moved = x if list(order) == sorted(order) else x.permute(order)
    return moved.flatten(-count) if count > 1 else moved


def _spread(y: Any, sizes: Sequence[int], order: Sequence[int]) -> Any:
    split = y.unflatten(-1, tuple(sizes)) if len(sizes) > 1 else y
    return split if list(order) == sorted(order) else split.permute(order)


def _convolution(node: Node, operand: Node) -> Operands | None:
    """A convolution whose windows do not overlap: 1 x 1, or cut into patches (kernel = stride)."""
    if not is_call(node, (torch.conv1d, torch.conv2d, torch.conv3d)):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, names)
    dims = node.target.__name__[4]  # type: ignore[union-attr]
    kernel = _shape(weight)[2:]
    strides, dilations = _each(stride, 1, int(dims)), _each(dilation, 1, int(dims))
    if groups not in (None, 1) or not _is_unpadded(padding, kernel):
        return None
    if any(k > 1 and (s != k or d != 1) for k, s, d in zip(kernel, strides, dilations, strict=True)):
        return None
    operands = Operands(
        x,
        weight,
        bias,
        matrix=partial(torch.flatten, start_dim=1),
        enter=partial(_patches, kernel=kernel, strides=strides),
        leave=partial(torch.movedim, source=-1, destination=1),
    )
    return _with_a_batch(operands, kernel)


def _transposed_convolution(node: Node, operand: Node) -> Operands | None:
    """A transposed convolution whose windows do not overlap (kernel = stride): each input becomes a patch."""
    if not is_call(node, (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, more, groups, dilation = _arguments(node, names)
    kernel = _shape(weight)[2:]
    dims = len(kernel)
    if groups not in (None, 1) or any(_each(padding, 0, dims) + _each(more, 0, dims)):
        return None
    if _each(stride, 1, dims) != kernel or any(_each(dilation, 1, dims)[i] != 1 for i, k in enumerate(kernel) if k > 1):
        return None
    operands = Operands(
        x,
        weight,
        matrix=_columns,
        enter=partial(_of_first, step=_channels_last) if isinstance(bias, Node) else _channels_last,
        leave=partial(_as_patches, kernel=kernel),
        given=(bias,) if isinstance(bias, Node) else (),
    )
    return _with_a_batch(operands, kernel)


def _with_a_batch(operands: Operands, kernel: Sequence[int]) -> Operands | None:
    """These operands of a convolution; where x is one image without a batch, it becomes one of one."""
    dims = len(_shape(operands.x)) - len(kernel)
    if dims == 1:
        enter, leave = partial(_of_one, step=operands.enter), partial(_one_of, step=operands.leave)
        return replace(operands, enter=enter, leave=leave)
    return operands if dims == 2 else None


def _of_one(x: Any, *given: Any, step: Step) -> Any:
    return step(x.unsqueeze(0), *given)


def _one_of(y: Any, *given: Any, step: Step) -> Any:
    return step(y, *given).squeeze(0)


def _columns(weight: Any) -> Any:
    return weight.flatten(1).t()


def _channels_last(x: Any) -> Any:
    return x.movedim(1, -1)


def _as_patches(y: Any, bias: Any = None, *, kernel: Sequence[int]) -> Any:
    """(batch, *counts, channels * prod(kernel)) -> (batch, channels, *sizes), plus a bias for each channel."""
    dims = len(kernel)
    y = y.unflatten(-1, (-1, *kernel)).movedim(dims + 1, 1)
    for dim in range(dims):  # each count next to its size within a patch, and both become one
        y = y.movedim(dims + 2, dim + 3).flatten(dim + 2, dim + 3)
    return y if bias is None else y + bias.type_as(y).reshape((-1, *(1,) * dims))


def _is_unpadded(padding: object, kernel: Sequence[int]) -> bool:
    if isinstance(padding, str):
        return padding == "valid" or math.prod(kernel) == 1
    return not any(_each(padding, 0, len(kernel)))


def _each(value: Any, default: int, dims: int) -> tuple[int, ...]:
    """An argument that may be absent, one number for all dimensions, or one for each."""
    if value is None:
        return (default,) * dims
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dims if len(values) == 1 else values


def _patches(x: Any, kernel: Sequence[int], strides: Sequence[int]) -> Any:
    """(batch, channels, *sizes) -> (batch, *counts, channels * prod(kernel)), and what is no whole patch is dropped."""
    inner: list[int] = []
    dim = 2
    for size, stride in zip(kernel, strides, strict=True):
        everything = (slice(None),) * dim
        if size == 1:
            x = x[(*everything, slice(None, None, stride))] if stride > 1 else x
        else:
            whole = x.shape[dim] // size * size
            x = x[(*everything, slice(None, whole))].unflatten(dim, (-1, size))
            inner.append(dim + 1)
        dim += 1 + (size > 1)
    outer = [d for d in range(2, dim) if d not in inner]
    return x.permute([0, *outer, 1, *inner]).flatten(len(outer) + 1)


def _arguments(node: Node, names: Sequence[str]) -> list[Any]:
    """Positional or keyword arguments by name; None where absent."""
    given = dict(zip(names, node.args, strict=False))
    return [given.get(name, node.kwargs.get(name)) for name in names]


def _shape(argument: object) -> tuple[int, ...]:
    value = value_of(argument)
    return () if value is None else tuple(value.shape)


PATTERNS: tuple[Callable[[Node, Node], Operands | None], ...] = (
    _linear,
    _addmm,
    _addmv,
    _matmul,
    _bmm,
    _grouped_mm,
    _einsum,
    _tensordot,
    _convolution,
    _transposed_convolution,
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
