"""What a pattern returns: the arguments of a matmul in their parts, and the steps around it.

    leave(enter(x) @ matrix(weight).T + bias)

`matrix` gives the weight as (out, in), without copying; `enter` moves what is contracted to the last dimension of x,
`leave` moves the last dimension, `out`, to where the node has it. All three are plain functions of a tensor: a rewrite
traces them into the graph (so a method takes its arguments as torch's function of that name does), a test calls them.

A weight may hold several matrices, as those of experts: then `matrix` gives (matrices, out, in), and `enter` brings x
into an order in which the rows that meet the same matrix are neighbours. `ends` says where those of each matrix end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from pixelfly_compiler.passes.weights import value_of

Step = Callable[..., Any]  # of a tensor, or of a proxy for one


def same(x: Any) -> Any:
    return x


def transpose(x: Any) -> Any:
    return x.transpose(-1, -2)


def of_first(x: Any, _: Any, step: Step) -> Any:
    """A step that needs nothing of what it is given behind the tensor."""
    return step(x)


@dataclass(frozen=True)
class Operands:
    """A node's arguments in their parts. `addend` is added to what `leave` returns.

    `given` are nodes that `enter`, `leave` and `ends` take behind the tensor. `ends(enter(x, *given), *given)` is
    (matrices,) int32; without it each matrix meets as many rows. `apart`, if there is one: the same, where several
    matrices are joined to one since all rows meet them, without joining them. `once`: x has the rows once that meet
    each matrix, and only an index knows how many it picks.
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
    once: bool = False


def shape_of(argument: object) -> tuple[int, ...]:
    value = value_of(argument)
    return () if value is None else tuple(value.shape)


def is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1
