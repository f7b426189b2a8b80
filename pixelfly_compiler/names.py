"""What the compiled model calls the weights of a graph, also where Dynamo broke the model into pieces.

After a graph break Dynamo sees a function of some submodule, and names weights from there. The compiled module itself
is on the stack while a graph is compiled, and knows its parameters by identity.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


def namesakes(gm: GraphModule, inputs: Sequence[object], root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> the weights that its code may run with, itself among them: code that Dynamo made of a submodule
    serves all of its class. Those that no other weight can stand for are left out.
    """
    local, names = parameter_names(gm, inputs), parameter_names_by_identity(gm, inputs, root)
    owners = {name: name.removesuffix(local[node]) for node, name in names.items()}
    inner = {name: owner[:-1] for name, owner in owners.items() if owner.endswith(".")}  # not found in the root itself
    if not inner:
        return {}
    modules = {own_name(f"{path}.")[:-1]: module for path, module in root.named_modules()}
    shapes = {own_name(path): weight.shape for path, weight in root.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[str, ...]] = {}
    for name, owner in inner.items():
        alike = (path for path, module in modules.items() if type(module) is type(modules[owner]))
        places = (path + name.removeprefix(owner) for path in alike)
        found[name] = tuple(place for place in places if shapes.get(place) == shapes[name])
    return {name: places for name, places in found.items() if len(places) > 1}


def dense_if_shared(found: Found, gm: GraphModule, inputs: Sequence[object], origin: Origin, config: Config) -> Found:
    """What the user decides by name must be the same for all weights that the code of a submodule serves, or they stay
    dense. (A plan that is made for the whole model makes it so.)
    """
    if origin.root is None:
        return found
    places = namesakes(gm, inputs, origin.root)
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
