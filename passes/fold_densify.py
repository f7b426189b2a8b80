"""Fold a compact weight into the matmuls that use it: where the dense weight has no other use, it never exists.

    def forward(self, x, blocks, u, v, index):            def forward(self, x, blocks, u, v, index):
        w = pixelfly.densify(blocks, u, v, index, 64, 32)     y, _ = pixelfly.linear(x, blocks, u, v, index, 64, False)
        y = F.linear(x, w)                            -->     return (y,)
        return (y,)

Here blocks, u and v are what a `CompactWeight` computes of its factors, gamma included: elementwise, on compact data.
Transposes of w are followed, and casts to another dtype, which then apply to blocks, u and v. A matmul as in any of
`forms.PATTERNS` is folded, also in a sub-graph. What else uses w keeps it, densified. A w that is written to stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from pixelfly_compiler.kernels import ops  # registers torch.ops.pixelfly
from pixelfly_compiler.passes.matmuls import matmuls
from pixelfly_compiler.passes.rewrite import erase_unused, last_first, put_linear
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.sites import Match
from pixelfly_compiler.passes.weights import may_write, memory_of, sub_graphs, uses

DENSIFY = (torch.ops.pixelfly.densify, torch.ops.pixelfly.densify.default)


def fold_densify(gm: GraphModule, has_kernels: Callable[[torch.device], bool]) -> int:
    """Put `pixelfly::linear` in place of each matmul with a densified weight, on devices that have kernels for it.

    Returns how many.
    """
    modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
    folded, scopes, written = 0, Scopes.of(gm), _written(modules)
    for module in modules:
        densified = [node for node in module.graph.nodes if node.target in DENSIFY]
        found = [fold for node in densified for fold in _folds(module, node, scopes, written)]
        folds = {fold.match.node: fold for fold in found if _can_fold(fold.match, module, has_kernels)}
        for match in last_first(fold.match for fold in folds.values()):
            _replace(folds[match.node])
        for fold in folds.values():
            erase_unused(fold.match.weight)
        if folds:
            module.graph.lint()
            module.recompile()
        folded += len(folds)
    return folded


@dataclass(frozen=True)
class _Fold:
    """A matmul with `densify`, or with its transpose."""

    match: Match
    densify: Node
    transposed: bool


def _folds(module: GraphModule, densify: Node, scopes: Scopes, written: Set[int]) -> Iterator[_Fold]:
    shape = densify.meta["example_value"].shape
    found = list(uses(module, densify, shape))
    if any(memory_of(use.operand) & written for use in found):
        return
    for match in matmuls(found, densify.name, shape, scopes)[0]:
        if match.region is None and match.matrices is None:  # not of a part
            yield _Fold(match, densify, match.transposed)


def _written(modules: Sequence[GraphModule]) -> set[int]:
    """The memory that anything in these graphs may write to. What runs one of them does so there."""
    writing = (
        node
        for module in modules
        for node in module.graph.nodes
        if may_write(node) and sub_graphs(module, node) is None
    )
    return {memory for node in writing for source in node.all_input_nodes for memory in memory_of(source)}


def _can_fold(match: Match, module: GraphModule, has_kernels: Callable[[torch.device], bool]) -> bool:
    """A weight handed into a sub-graph stays dense there: its factors are not at hand."""
    value = match.node.meta["example_value"]
    return match.module is module and match.dtype in ops.DTYPES and has_kernels(value.device)


def _replace(fold: _Fold) -> None:
    match, densify = fold.match, fold.densify
    blocks, u, v, index, *_ = densify.args
    dtype = match.weight.meta["example_value"].dtype
    if dtype != densify.meta["example_value"].dtype:
        with match.module.graph.inserting_before(match.node):
            cast = [part and match.module.graph.call_method("to", (part, dtype)) for part in (blocks, u, v)]
        blocks, u, v = cast
    if fold.transposed:
        u, v = v, u
    put_linear(match, blocks, u, v, index, fold.transposed)
