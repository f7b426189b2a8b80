"""What is known of a weight, kept as long as the weight and by the weight itself: an attribute of it.

Not by weak references to it: `torch.utils.swap_tensors`, and so `Module.to` where it swaps, refuses a tensor with any.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from torch import Tensor

K = TypeVar("K")
V = TypeVar("V")

_numbers = count()


class _Known(dict[K, V]):
    """A copy of the weight, or what it is swapped with, may get this attribute: it is of `owner` alone."""

    __slots__ = ("__weakref__", "owner")
    __hash__ = object.__hash__  # type: ignore[assignment]  # for the set of all
    owner: int

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return OrderedDict, ()  # nothing goes along when a weight is saved or copied; `torch.load` knows this type


class Attached(Generic[K, V]):
    """A dictionary for each weight."""

    def __init__(self) -> None:
        self._name = f"_pixelfly_{next(_numbers)}"
        self._all: WeakSet[_Known[K, V]] = WeakSet()

    def __iter__(self) -> Iterator[dict[K, V]]:
        return iter(list(self._all))

    def __len__(self) -> int:
        return sum(map(bool, self))

    def clear(self) -> None:
        for known in self:
            known.clear()

    def of(self, weight: Tensor) -> dict[K, V]:
        known: Any = getattr(weight, self._name, None)
        if type(known) is not _Known or known.owner != id(weight):
            known = _Known[K, V]()
            known.owner = id(weight)
            self._all.add(known)
            setattr(weight, self._name, known)
        result: dict[K, V] = known
        return result
