"""What differs between the versions of torch and Triton that the GPU side runs on: torch 2.11 and newer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._inductor.virtualized import V


def size_hint(expression: Any, fallback: int) -> int:
    """The likely value of a symbolic size; the method was renamed in torch 2.12."""
    sizes: Any = V.graph.sizevars
    ask = getattr(sizes, "optimization_hint", None) or sizes.size_hint
    return int(ask(expression, fallback=fallback))


@cache
def fuse_through_views() -> None:
    """Epilogues that read the output of one of our templates through a view are fused, as Inductor does from 2.13 on.

    Before, it compares their loops, say (batch, tokens, features), with the template's (rows, features) as they stand,
    finds that no data is shared, and looks no further.
    """
    if torch.__version__ >= "2.13":
        return
    from torch._inductor.scheduler import Scheduler

    original: Any = Scheduler.score_fusion_memory

    def score_fusion_memory(self: Any, node1: Any, node2: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, node1, node2, *args, **kwargs)
        shared = sum(map(self.dep_size_hint, _read_through_views(node1, node2)))
        return (found[0] + shared, *found[1:]) if isinstance(found, tuple) else found + shared

    Scheduler.score_fusion_memory = score_fusion_memory  # type: ignore[method-assign]


def _read_through_views(node: Any, user: Any) -> list[Any]:
    """What `user` reads of the output of our template in `node` in other loops, which are the same when merged."""
    from torch._inductor.dependencies import MemoryDep

    template = node.get_template_node()
    if template is None or all(getattr(origin.target, "namespace", None) != "pixelfly" for origin in template.origins):
        return []
    written = {dep.name: dep for dep in node.read_writes.writes if isinstance(dep, MemoryDep)}
    return [
        dep
        for dep in user.read_writes.reads
        if isinstance(dep, MemoryDep)
        and dep.name in written
        and dep != written[dep.name]
        and dep.normalize() == written[dep.name].normalize()
    ]
