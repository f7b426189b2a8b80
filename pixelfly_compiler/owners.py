"""Which modules hold a weight, and which of them multiply with it: what tied weights are told apart by."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from pixelfly_compiler.decision import REPLAN, Entry
from pixelfly_compiler.errors import PlanMismatchError
from pixelfly_compiler.passes.weights import own_name

_REGISTER = (
    "if it is the model's, but in a list, a dict or a function, so that model.parameters() has not got it either, put "
    "it in an nn.ModuleList, nn.ModuleDict or nn.ParameterList"
)


@dataclass(frozen=True)
class Owner:
    """`module.attribute` is the weight; `path` is where the module stands in the model."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.attribute)


def owners(model: nn.Module) -> dict[str, list[Owner]]:
    """Parameter name -> all who hold that parameter, first the one of this name; a module of two names counts once."""
    holders: dict[int, dict[tuple[int, str], Owner]] = {}
    named: dict[str, tuple[int, Owner]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            owner = Owner(own_name(f"{path}.").rstrip("."), module, attribute)
            named[own_name(f"{path}.{attribute}".lstrip("."))] = id(parameter), owner
            holders.setdefault(id(parameter), {}).setdefault((id(module), attribute), owner)
    return {
        name: [own, *(other for place, other in holders[key].items() if place != (id(own.module), own.attribute))]
        for name, (key, own) in named.items()
    }


def planned(model: nn.Module, entries: Iterable[Entry]) -> list[tuple[Entry, list[Owner]]]:
    """Each entry, and who holds its weight; raises if this is not the model of the plan."""
    held_by = owners(model)
    found = []
    for entry in entries:
        holders = held_by.get(entry.parameter)
        if holders is None:
            raise PlanMismatchError(
                "the model has no such weight among its parameters", site=entry.name, next_step=f"{REPLAN}; {_REGISTER}"
            )
        check_shape(entry.name, holders[0].weight.shape, entry.weight_shape, "in the plan")
        found.append((entry, holders))
    return found


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int], where: str) -> None:
    """Raise unless the weight of this name has the shape that it has elsewhere."""
    if tuple(shape) != tuple(expected):
        raise PlanMismatchError(f"has shape {tuple(shape)}, {tuple(expected)} {where}", site=name, next_step=REPLAN)


def heads(holders: Sequence[Owner], modules: Collection[str]) -> list[Owner]:
    """Those of a table's holders that multiply with it, in place of looking it up; empty if none does that alone.

    `modules`: the paths of those that were seen to.
    """
    found = [owner for owner in holders if _is_one_of(owner.path, modules)]
    if not found:  # a module above multiplies with it
        found = [owner for owner in holders if not isinstance(owner.module, nn.Embedding | nn.EmbeddingBag)]
    return [] if len(found) == len(holders) else found


def _is_one_of(path: str, modules: Collection[str]) -> bool:
    """After a graph break Dynamo may see a submodule as the root, and so only the end of a path."""
    return any(path == module or (module and path.endswith(f".{module}")) for module in modules)
