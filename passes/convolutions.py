"""Patterns of convolutions whose windows do not overlap: each window is a row of a matmul."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from pixelfly_compiler.passes.operands import Operands, Step, of_first, shape_of
from pixelfly_compiler.passes.weights import arguments, is_call


def convolution(node: Node, operand: Node) -> Operands | None:
    """A convolution whose windows do not overlap: 1 x 1, or cut into patches (kernel = stride)."""
    if not is_call(node, (torch.conv1d, torch.conv2d, torch.conv3d)):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = arguments(node, names)
    dims = node.target.__name__[4]  # type: ignore[union-attr]
    kernel = shape_of(weight)[2:]
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


def _is_unpadded(padding: object, kernel: Sequence[int]) -> bool:
    if isinstance(padding, str):
        return padding == "valid" or math.prod(kernel) == 1
    return not any(_each(padding, 0, len(kernel)))


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


def transposed_convolution(node: Node, operand: Node) -> Operands | None:
    """A transposed convolution whose windows do not overlap (kernel = stride): each input becomes a patch."""
    if not is_call(node, (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, more, groups, dilation = arguments(node, names)
    kernel = shape_of(weight)[2:]
    dims = len(kernel)
    if groups not in (None, 1) or any(_each(padding, 0, dims) + _each(more, 0, dims)):
        return None
    if _each(stride, 1, dims) != kernel or any(_each(dilation, 1, dims)[i] != 1 for i, k in enumerate(kernel) if k > 1):
        return None
    operands = Operands(
        x,
        weight,
        matrix=_columns,
        enter=partial(of_first, step=_channels_last) if isinstance(bias, Node) else _channels_last,
        leave=partial(_as_patches, kernel=kernel),
        given=(bias,) if isinstance(bias, Node) else (),
    )
    return _with_a_batch(operands, kernel)


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


def _with_a_batch(operands: Operands, kernel: Sequence[int]) -> Operands | None:
    """These operands of a convolution; where x is one image without a batch, it becomes one of one."""
    dims = len(shape_of(operands.x)) - len(kernel)
    if dims == 1:
        enter, leave = partial(_of_one, step=operands.enter), partial(_one_of, step=operands.leave)
        return replace(operands, enter=enter, leave=leave)
    return operands if dims == 2 else None


def _of_one(x: Any, *given: Any, step: Step) -> Any:
    return step(x.unsqueeze(0), *given)


def _one_of(y: Any, *given: Any, step: Step) -> Any:
    return step(y, *given).squeeze(0)


def _each(value: Any, default: int, dims: int) -> tuple[int, ...]:
    """An argument that may be absent, one number for all dimensions, or one for each."""
    if value is None:
        return (default,) * dims
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dims if len(values) == 1 else values
