"""What the compiled model calls the weights of a graph, also where Dynamo broke the model into pieces.

After a graph break Dynamo sees a function of some submodule, and names weights from there. The compiled module itself
is on the stack while a graph is compiled, and knows its parameters by identity.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from pixelfly_compiler.config import Config
from pixelfly_compiler.passes.sites import Found, Site, SiteConfig
from pixelfly_compiler.passes.weights import own_name, parameter_names, parameter_names_by_identity

_TORCH = str(Path(torch.__file__).parent)
_ENTRANCE = "compile_wrapper"  # the function of Dynamo's that a call of compiled code goes through


@dataclass(frozen=True)
class Origin:
    """Where a graph is from. `root`: the module that `torch.compile` was called on, None for a function.

    `whole`: is the graph all of it? After a graph break it is only a piece. Where Dynamo gives up on a function it
    compiles the functions called in it: they are pieces too.
    """

    root: nn.Module | None
    whole: bool


def origin_of(gm: GraphModule) -> Origin:
    """Looks up the stack: to be called while a backend runs."""
    broken = getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False)
    frame: FrameType | None = sys._getframe(3)  # above the backend and its decorator
    while frame is not None and frame.f_code.co_name != _ENTRANCE:
        # A function of the model's own, between the entrance and us.
        broken = broken or not frame.f_code.co_filename.startswith(_TORCH)
        frame = frame.f_back
    return Origin(_root_above(frame), not broken)


def _root_above(frame: FrameType | None) -> nn.Module | None:
    """The outermost compiled module that is being called."""
    root = None
    while frame is not None:
        caller = frame.f_back
        if frame.f_code.co_name == _ENTRANCE and caller is not None and caller.f_code.co_filename.startswith(_TORCH):
            module = caller.f_locals.get("self")
            root = getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else root
        frame = caller
    return root.module if isinstance(root, DistributedDataParallel) else root


def names_of(gm: GraphModule, example_inputs: Sequence[object], origin: Origin) -> dict[str, str]:
    """Placeholder name -> parameter name, as the compiled module calls it if there is one."""
    if origin.root is None:
        return parameter_names(gm, example_inputs)
    return parameter_names_by_identity(gm, example_inputs, origin.root)


def weight_names(model: nn.Module, found: Found) -> set[str]:
    """All names of a model's parameters and of their parts that are sites; of what a weight is computed from, as a
    compact one is, also the weight's.
    """
    names = {own_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= {re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", name) for name in names}
    return names | {site.name for site in found.sites}


def namesakes(graphs: Iterable[tuple[GraphModule, Sequence[object]]], root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> the weights that the code of these graphs may run with in its place, and itself: code that
    Dynamo made of a submodule serves all of its class. Without those that no other weight can stand for.
    """
    modules = {own_name(f"{path}.")[:-1]: module for path, module in root.named_modules()}
    shapes = {own_name(path): weight.shape for path, weight in root.named_parameters(remove_duplicate=False)}
    by_class: dict[type, list[str]] = {}
    for path, module in modules.items():
        by_class.setdefault(type(module), []).append(path)
    found: dict[str, dict[str, None]] = {}
    for gm, inputs in graphs:
        local = parameter_names(gm, inputs)
        for node, name in parameter_names_by_identity(gm, inputs, root).items():
            owner = name.removesuffix(f".{local[node]}")
            if name in shapes and owner in modules:  # else it was found in the root itself, or is none of its own
                places = (path + name.removeprefix(owner) for path in by_class[type(modules[owner])])
                alike = (place for place in places if shapes.get(place) == shapes[name])
                found.setdefault(name, {}).update(dict.fromkeys(alike))
    return {name: tuple(places) for name, places in found.items() if len(places) > 1}


def dense_if_shared(found: Found, gm: GraphModule, inputs: Sequence[object], origin: Origin, config: Config) -> Found:
    """What the user decides by name must be the same for all weights that the code of a submodule serves, or they stay
    dense. `plan()` already decides alike for them.
    """
    if origin.root is None:
        return found
    places = namesakes([(gm, inputs)], origin.root)
    sites = tuple(_dense_if_split(site, places.get(site.parameter, ()), config) for site in found.sites)
    return replace(found, sites=sites)


def _dense_if_split(site: Site, names: Sequence[str], config: Config) -> Site:
    if site.reason is not None:
        return site
    own = _decision(site, site.parameter, config)
    other = next((name for name in names if _decision(site, name, config) not in (own, None)), None)
    if other is None:
        return site
    return replace(site, reason=f"after a graph break its code also runs for {other}, which is decided otherwise")


def _decision(site: Site, name: str, config: Config) -> SiteConfig | str | None:
    """What the user says of a weight that stands where that of the site does; None if nothing."""
    if config.plan is None:
        return "dense" if config.excludes((name,)) else "any"
    entry = config.plan.find(name + site.label, site.weight_shape)
    return None if entry is None or not entry.is_site else entry.config or "dense"
