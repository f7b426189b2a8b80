"""Where in a parameter the elements of a matrix lie, whatever views and copies are made on the way to it.

A view of a parameter has strides in the parameter's memory. A copy of one, as of `w.permute(1, 0, 2).reshape(n, -1)`,
has not: but each of its dimensions is made of one or more that have. `Layout` is a tensor's description in those terms,
`Region` that of the matrix or matrices that a matmul uses, as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

Steps = tuple[tuple[int, int], ...]  # (size, stride) of what a dimension is made of; the last moves fastest


@dataclass(frozen=True)
class Layout:
    """A tensor that shows elements of a parameter: what each of its dimensions is made of, in the parameter's memory.

    A dimension of one step has a stride, as a view's have.
    """

    dims: tuple[Steps, ...]
    offset: int

    @staticmethod
    def of(view: Tensor) -> Layout:
        """That of a view of the parameter."""
        return Layout(
            tuple(((size, stride),) for size, stride in zip(view.shape, view.stride(), strict=True)),
            int(view.storage_offset()),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for size, _ in steps) for steps in self.dims)

    @property
    def is_flipped(self) -> bool:
        """Is this the transpose of what is stored?"""
        return self.dims[-2][-1][1] < self.dims[-1][-1][1]

    def within(self, copied: Layout | None) -> Layout | None:
        """This view of a copy, in the memory of the parameter that `copied` of it was copied from, one element after
        the other. None if its dimensions are not made of whole steps there.
        """
        if copied is None or 0 in self.shape:
            return self
        radix = [step for steps in copied.dims for step in steps]
        digits = _unravel(self.offset, [size for size, _ in radix])
        last = list(digits)  # of each step there, the largest index that is reached
        dims = []
        for steps in self.dims:
            made: list[tuple[int, int]] = []
            for size, stride in steps:
                taken = _taken(size, stride, [size for size, _ in radix])
                if taken is None:
                    return None
                made += [(count, step * radix[place][1]) for place, count, step in taken]
                for place, count, step in taken:
                    last[place] += (count - 1) * step
            dims.append(_joined(made))
        if any(index >= size for index, (size, _) in zip(last, radix, strict=True)):
            return None
        return Layout(
            tuple(dims), copied.offset + sum(i * stride for i, (_, stride) in zip(digits, radix, strict=True))
        )


def _taken(size: int, stride: int, radix: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """The (place, size, stride) among digits of this radix, the last of which moves fastest, of so many equal steps."""
    if size == 1 or not radix:
        return [] if size == 1 else None
    if stride == 0:
        return [(len(radix) - 1, size, 0)]
    taken: list[tuple[int, int, int]] = []
    for place in reversed(range(len(radix))):
        if stride % radix[place] == 0:
            stride //= radix[place]
            continue
        room = min(size, max(radix[place] // stride, 1))
        if size > room and (radix[place] % stride or size % room):
            return None
        taken.insert(0, (place, room, stride))
        size, stride = size // room, 1
        if size == 1:
            return taken
    return None


def _joined(steps: Sequence[tuple[int, int]]) -> Steps:
    """The same with as few steps as there can be."""
    joined: list[tuple[int, int]] = []
    for size, stride in steps:
        if size == 1 and len(steps) > 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return tuple(joined) or ((1, 1),)


class Copies(TorchDispatchMode):
    """Sees which of the tensors that are made inside of it show `view`, of a parameter's memory or a copy's (`origin`),
    in memory of their own.
    """

    def __init__(self, view: Tensor, origin: Layout | None) -> None:
        super().__init__()
        self._origins: dict[int, tuple[Tensor, Layout | None]] = {_memory(view): (view, origin)}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.clone.default:
            self._add(args[0], result)
        elif isinstance(operator, OpOverload) and operator._schema.is_mutable:
            self._origins.clear()
        return result

    def _add(self, source: Tensor, copy: Tensor) -> None:
        order = sorted(range(copy.dim()), key=lambda dim: -copy.stride()[dim])
        if not self.shows(source) or not source.numel() or not copy.permute(order).is_contiguous():
            return
        origin = Layout.of(source.permute(order)).within(self.origin(source))
        if origin is not None:
            self._origins[_memory(copy)] = copy, origin

    def shows(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._origins

    def origin(self, tensor: Tensor) -> Layout | None:
        """Of the memory of a tensor that shows the view: what was copied there; None if it is the parameter's own."""
        return self._origins[_memory(tensor)][1]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Region:
    """A matrix, or several, inside a parameter, as it is stored: `weight.as_strided(size, stride, offset)`, if that is
    contiguous, in the `shape` that its dimensions fold to; None where they do not.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    shape: tuple[int, ...] | None = None

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Region:
        """The region that `dataclasses.asdict`, and JSON, made `values` of."""
        shape = values.get("shape")
        stride, shape = tuple(values["stride"]), None if shape is None else tuple(shape)
        return Region(tuple(values["size"]), stride, values["offset"], shape)

    @staticmethod
    def of(layout: Layout) -> Region:
        """The region that one matrix or several show; a matrix and its transpose show the same."""
        dims = layout.dims
        if len(dims) > 1 and layout.is_flipped:
            dims = (*dims[:-2], dims[-1], dims[-2])
        steps = [step for steps in dims for step in steps]
        size, stride = tuple(size for size, _ in steps), tuple(stride for _, stride in steps)
        folded = tuple(math.prod(size for size, _ in steps) for steps in dims)
        return Region(size, stride, layout.offset, None if len(steps) == len(dims) else folded)

    @staticmethod
    def whole(shape: Sequence[int]) -> Region:
        """All of a parameter, as it is stored."""
        return Region(tuple(shape), torch.empty(tuple(shape), device="meta").stride(), 0)

    def unfolded(self, weight: Tensor) -> Tensor:
        """This part of a weight, in as many dimensions as it has strides. It shares the weight's memory if that is
        contiguous.
        """
        weight = weight.contiguous()
        return weight.as_strided(self.size, self.stride, weight.storage_offset() + self.offset)

    def view(self, weight: Tensor) -> Tensor:
        """The matrix, or matrices, in this part of a weight; a copy where dimensions fold."""
        return self.unfolded(weight).reshape(self.shape or self.size)

    def is_matrix_of(self, shape: Sequence[int]) -> bool:
        """Is this one matrix, and every element of a parameter in it?"""
        return len(self.shape or self.size) == 2 and math.prod(self.size) == math.prod(shape) and self.is_box(shape)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The parameter of this shape all of which is this matrix; a view of it where there is one."""
        order = sorted(range(len(self.size)), key=lambda dim: -self.stride[dim])
        return matrix.reshape(self.size).permute(order).reshape(tuple(shape))

    def is_all_of(self, shape: Sequence[int]) -> bool:
        """Is this the whole of a parameter, as it is stored?"""
        return self == Region.whole(shape)

    def box(self, shape: Sequence[int]) -> tuple[range, ...]:
        """The least box of a parameter's indices around this region; a larger one if the region runs over the end of a
        row.
        """
        if 0 in self.size:
            return tuple(range(0) for _ in shape)
        first = _unravel(self.offset, shape)
        last = list(first)
        for size, stride in zip(self.size, self.stride, strict=True):
            last = [index + more for index, more in zip(last, _reach(size, stride, shape), strict=True)]
        if any(index >= size for index, size in zip(last, shape, strict=True)):
            end = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
            return _lines(first, _unravel(end, shape), shape)
        return tuple(range(low, high + 1) for low, high in zip(first, last, strict=True))

    def is_box(self, shape: Sequence[int]) -> bool:
        """Is this all of its box, each element once?"""
        reach = 0
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1 and stride <= reach:
                return False
            reach += max(size - 1, 0) * stride
        return math.prod(map(len, self.box(shape))) == math.prod(self.size)

    def label(self, shape: Sequence[int]) -> str:
        """As Python would index it: "" for all of it, "[64:128]" for some of its rows, "[3]" for one matrix of many."""
        if self.is_all_of(shape):
            return ""
        texts = [_index(indices, size) for indices, size in zip(self.box(shape), shape, strict=True)]
        while texts and texts[-1] == ":":
            texts.pop()
        return f"[{', '.join(texts)}]" if texts else ""


def _reach(size: int, stride: int, shape: Sequence[int]) -> list[int]:
    """How far so many equal steps go in each dimension."""
    taken = _taken(size, stride, shape)
    if taken is None:
        return [(size - 1) * step for step in _unravel(stride, shape)]
    reach = [0] * len(shape)
    for place, count, step in taken:
        reach[place] += (count - 1) * step
    return reach


def _lines(first: Sequence[int], last: Sequence[int], shape: Sequence[int]) -> tuple[range, ...]:
    """The box around all that is stored from one element to another."""
    pairs = list(zip(first, last, strict=True))
    place = next((place for place, (low, high) in enumerate(pairs) if low != high), len(pairs) - 1)
    whole = [range(size) for size in shape[place + 1 :]]
    return (*(range(low, high + 1) for low, high in pairs[: place + 1]), *whole)


def _unravel(offset: int, shape: Sequence[int]) -> list[int]:
    indices: list[int] = []
    for size in reversed(shape):
        offset, index = divmod(offset, max(size, 1))
        indices.append(index)
    return indices[::-1]


def _index(indices: range, size: int) -> str:
    if len(indices) == size:
        return ":"
    return str(indices.start) if len(indices) == 1 else f"{indices.start}:{indices.stop}"


def overlap(a: Sequence[range], b: Sequence[range]) -> bool:
    return all(one.start < other.stop and other.start < one.stop for one, other in zip(a, b, strict=True))
