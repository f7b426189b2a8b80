"""Find sites: the matmuls of a Dynamo graph whose one operand is a parameter.

    def forward(self, x, weight, bias):              Site("fc.weight", out=128, in=64, rows=32, transposed=True)
        x1 = x.view(-1, 64)                  -->     Match("fc.weight", node=addmm, x=x1, weight=weight, bias=bias)
        y = torch.addmm(bias, x1, weight)

What else uses a parameter decides whether it can be a site; a parameter that no matmul uses is `Skipped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import sympy
import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.flops import other_flops
from pixelfly_compiler.passes.matmuls import matmuls
from pixelfly_compiler.passes.reasons import BOTH_ORIENTATIONS, also_used, ineligible, looked_up, no_matmul, overlapping
from pixelfly_compiler.passes.regions import Region, overlap
from pixelfly_compiler.passes.roles import assign_roles
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.sites import Found, Match, Site, Skipped
from pixelfly_compiler.passes.weights import (
    Use,
    dtype_name,
    is_call,
    may_write,
    only_looks,
    parameter_names,
    placeholders,
    qualified_name,
    source_name,
    uses,
)


def find_sites(gm: GraphModule, example_inputs: Sequence[object], names: Mapping[str, str] | None = None) -> Found:
    """Sites, matches and skipped parameters of a Dynamo graph.

    `names` maps placeholder names to parameter names; by default `parameter_names(gm, example_inputs)`. A placeholder
    that is not in it is no weight. The graph is not changed.
    """
    names = parameter_names(gm, example_inputs) if names is None else names
    parameters = {
        node: value
        for node, value in zip(placeholders(gm), example_inputs, strict=False)
        if node.name in names and isinstance(value, torch.Tensor)
    }
    scopes = Scopes.of(gm)
    weights = {node: _Weight(gm, node, value, names[node.name], scopes) for node, value in parameters.items()}
    _settle_products_of_two(weights.values())
    matches = [match for weight in weights.values() for match in weight.matches]
    stored = [*parameters, *_buffers(gm, example_inputs)]
    flops = other_flops(
        gm, {node: node in weights for node in stored}, {match.node for match in matches}, scopes.hidden
    )
    sites = [site for node, weight in weights.items() for site in weight.sites(flops[node])]
    nodes = {site.name: [match.node for match in matches if match.site == site.name] for site in sites}
    roles = assign_roles(gm, [(site.name, site.weight_shape, nodes[site.name]) for site in sites])
    sites = [replace(site, role=roles[site.name]) for site in sites]
    eligible = {site.name for site in sites if site.reason is None}
    # Of weights that are computed with together, as by `stack`, one has the flops of the matmul that follows.
    multiplied = {use.user for node, weight in weights.items() if flops[node] for use in weight.others}
    skipped = [
        weight.skipped(flops[node], any(use.user in multiplied for use in weight.others))
        for node, weight in weights.items()
        if not weight.matches and (weight.value.dim() >= 2 or flops[node])
    ]
    return Found(tuple(sites), tuple(match for match in matches if match.site in eligible), tuple(skipped))


def _buffers(gm: GraphModule, example_inputs: Sequence[object]) -> list[Node]:
    """The placeholders of floating-point buffers: a weight may be computed with them, as in spectral norm."""
    return [
        node
        for node, value in zip(placeholders(gm), example_inputs, strict=False)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "_buffers" in (source_name(node) or "")
    ]


def _settle_products_of_two(weights: Collection[_Weight]) -> None:
    """In a matmul of two parameters the right one is the weight: `queries @ weight`."""
    times = Counter(match.node for weight in weights for match in weight.matches)
    for weight in weights:
        shared = [match for match in weight.matches if times[match.node] > 1]
        weight.leave_to_others({m.node for m in shared if m.weight is not m.node.all_input_nodes[-1]})


class _Weight:
    """One parameter of a graph: its uses, sorted into matmuls, lookups and others."""

    def __init__(self, gm: GraphModule, node: Node, value: torch.Tensor, name: str, scopes: Scopes) -> None:
        self.name, self.shape, self.value = name, tuple(int(size) for size in value.shape), value
        self.uses = [use for use in uses(gm, node, self.shape) if not _reads_nothing(use)]
        self.matches, rest = matmuls(self.uses, name, self.shape, scopes)
        self.others = [use for use in rest if not _is_lookup(use)]
        self.scopes = scopes
        self.factors: set[Node] = set()  # matmuls of which another parameter is taken for the weight

    @property
    def looked_up(self) -> bool:
        return len(self.uses) > len(self.matches) + len(self.others)

    def leave_to_others(self, nodes: Collection[Node]) -> None:
        """These matmuls are another weight's, and this parameter is what is multiplied with it."""
        self.matches = [match for match in self.matches if match.node not in nodes]
        self.others += [use for use in self.uses if use.user in nodes]
        self.factors = set(nodes)

    def sites(self, other_flops: int) -> list[Site]:
        names = dict.fromkeys(match.site for match in self.matches)
        sites = [self._site([match for match in self.matches if match.site == name]) for name in names]
        first = [replace(site, other_flops=site.other_flops + other_flops) for site in sites[:1]]
        return [*first, *sites[1:]]

    def _site(self, matches: Sequence[Match]) -> Site:
        first, modules = matches[0], _modules(matches)
        alike = [match for match in matches if match.region == first.region]  # others' rows are of other lengths
        return Site(
            name=first.site,
            weight_shape=self.shape,
            out_features=first.out_features,
            in_features=first.in_features,
            transposed=first.transposed,
            rows=sum(match.rows for match in alike),
            rows_expr=str(sum((sympy.sympify(match.rows_expr) for match in alike), sympy.Integer(0))),
            role="",
            dtype=dtype_name(first.dtype),
            device=str(self.value.device),
            uses=len(matches),
            shared=self.looked_up,
            aliases=_names_in(modules, first.site) if self.looked_up else (),
            reason=ineligible(self.value) or self._conflict(matches),
            region=first.region,
            matrices=first.matrices or 1,
            trained=self.value.requires_grad,
            modules=modules,
            other_flops=sum(match.flops for match in matches if match.region != first.region),
            nodes=tuple(match.node.name for match in matches),
        )

    def _region(self, match: Match) -> Region:
        return match.region or Region.whole(self.shape)

    def _box(self, use: Use) -> tuple[range, ...]:
        """The indices that a use may concern."""
        region = Region.whole(self.shape) if use.layout is None else Region.of(use.layout)
        return region.box(self.shape)

    def _conflict(self, matches: Sequence[Match]) -> str | None:
        """Why what one matmul uses cannot change: something else uses it too, and in another way."""
        first = self._region(matches[0])
        box = first.box(self.shape)
        for use in self.others:
            if overlap(box, self._box(use)):
                return also_used(use, self.scopes, self.factors)
        if not first.is_box(self.shape):
            repeats = 0 in first.stride
            return "the weight is repeated" if repeats else "a part of the weight with gaps"
        if any(match.transposed != matches[0].transposed for match in matches):
            return BOTH_ORIENTATIONS
        for other in self.matches:
            region = self._region(other)
            if region != first and overlap(box, region.box(self.shape)):
                return overlapping(matches[0].site, other.site)
        return None

    def skipped(self, flops: int, multiplies: bool) -> Skipped:
        """`multiplies`: a matmul follows on what uses this weight."""
        lookup = bool(self.uses) and not self.others
        reason = self._why_no_matmul(flops, multiplies)
        return Skipped(self.name, self.shape, reason, lookup, used=bool(self.uses), flops=flops)

    def _why_no_matmul(self, flops: int, multiplies: bool) -> str:
        reason = ineligible(self.value)
        if reason is not None:
            return reason
        if not self.uses:
            return "nothing uses what is computed with it" if flops else "not used in this graph"
        if not self.others:
            return looked_up(flops)
        return no_matmul(self.others[0], self.scopes, self.factors, flops, multiplies)


def _is_lookup(use: Use) -> bool:
    """An embedding lookup in this table: it stays dense, and does not stop the weight from being a site. One with a
    `max_norm` writes to the table.
    """
    user = use.user
    if may_write(user):
        return False
    if is_call(user, (F.embedding, torch.embedding)):
        return use.operand in user.args[:2] or user.kwargs.get("weight") is use.operand
    return is_call(user, (F.embedding_bag,)) and use.operand is not user.kwargs.get("per_sample_weights")


def _reads_nothing(use: Use) -> bool:
    """Nodes that only look at the weight's metadata, or that nothing needs."""
    user = use.user
    if user.op not in ("call_function", "call_method") or may_write(user):
        return False
    return not user.users or only_looks(user, use.operand)


def _modules(matches: Sequence[Match]) -> tuple[str, ...]:
    """The modules in whose forward the matmuls stand."""
    stacks = (list((match.node.meta.get("nn_module_stack") or {}).values()) for match in matches)
    names = (qualified_name(stack[-1][0]) for stack in stacks if stack)
    return tuple(dict.fromkeys("" if module == root else module for root, module in names))


def _names_in(modules: Iterable[str], name: str) -> tuple[str, ...]:
    """What the modules that multiply with a tied weight call it: `lm_head.weight` for `wte.weight`."""
    key = name.rpartition(".")[2]
    names = [f"{module}.{key}" if module else key for module in modules]
    return tuple(other for other in names if other != name)
