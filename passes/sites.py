"""Find sites: the matmuls of a Dynamo graph whose one operand is a parameter.

    def forward(self, x, weight, bias):              Site("fc.weight", out=128, in=64, rows=32, transposed=True)
        x1 = x.view(-1, 64)                  -->     Match("fc.weight", node=addmm, x=x1, weight=weight, bias=bias)
        y = torch.addmm(bias, x1, weight)

A `Site` is a value: one for each weight, however many matmuls use it, or for each part of a weight that matmuls use by
itself (chunks of a packed qkv). A `Match` is one matmul node of the graph, with what a rewrite needs. A weight that
cannot become sparse is a site with a reason (it still counts in the budget). A parameter of two or more dimensions that
no matmul uses is `Skipped`, with a reason, and with the flops of what else multiplies with it. Nothing is dropped
silently.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from pixelfly_compiler.kernels.support import Support, flat_butterfly, kept_elements
from pixelfly_compiler.passes.experts import selected
from pixelfly_compiler.passes.flops import flops_of, hint, other_flops
from pixelfly_compiler.passes.forms import operands_of
from pixelfly_compiler.passes.operands import Operands
from pixelfly_compiler.passes.regions import Copies, Layout, Region, overlap
from pixelfly_compiler.passes.roles import assign_roles
from pixelfly_compiler.passes.scopes import Scopes
from pixelfly_compiler.passes.weights import (
    FLOATS,
    Use,
    called,
    is_call,
    is_cast,
    may_write,
    only_looks,
    parameter_names,
    placeholders,
    qualified_name,
    source_name,
    stops_gradients,
    uses,
    value_of,
)


@dataclass(frozen=True)
class SiteConfig:
    """How a site is made sparse: `block` x `block` blocks on the diagonal and at `strides` strides, beginning at place
    `first` of their list (see `kernels.support`), and a term of rank `rank`.
    """

    block: int
    strides: int
    rank: int
    first: int = 0

    def support(self, out_features: int, in_features: int) -> Support:
        """The kept blocks of an (out, in) weight."""
        return flat_butterfly(out_features, in_features, self.block, self.strides, self.first)

    def kept_blocks(self, out_features: int, in_features: int) -> int:
        """Elements of the kept blocks of an (out, in) weight, without building the support."""
        return kept_elements(out_features, in_features, self.block, self.strides, self.first)

    def kept(self, out_features: int, in_features: int) -> int:
        """Elements of the kept blocks and of the low-rank factors."""
        return self.kept_blocks(out_features, in_features) + self.rank * (out_features + in_features)

    def __str__(self) -> str:
        begin = f" from {self.first}" if self.first else ""
        return f"block {self.block}, strides {self.strides}{begin}, rank {self.rank}"


@dataclass(frozen=True)
class Site:
    """One weight, or a part of one, and the matmuls that use it.

    `name` is the parameter's, with the part's indices behind it. `region` is the matrix inside the parameter, None if
    it is all of a two-dimensional one. `rows` is the hint of the symbolic `rows_expr`, the rows of all its matmuls.
    """

    name: str
    weight_shape: tuple[int, ...]
    out_features: int
    in_features: int
    transposed: bool  # the weight is stored (in, out), as in HF's Conv1D
    rows: int
    rows_expr: str
    role: str
    dtype: str  # of the matmul: bfloat16 under autocast, whatever the weight's own
    device: str
    uses: int = 1
    shared: bool = False  # the weight also feeds an embedding lookup, which stays dense
    aliases: tuple[str, ...] = ()  # the weight's other names in the model (tied weights)
    reason: str | None = None  # why this site cannot be sparse, None if it can
    region: Region | None = None
    matrices: int = 1  # that the weight holds; each row meets one of them
    modules: tuple[str, ...] = ()  # that multiply with it; "" is the one that Dynamo saw as `self`
    namesakes: tuple[str, ...] = ()  # other sites that its code may run for, after a graph break
    other_flops: int = 0  # of what else multiplies with it
    nodes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def elements(self) -> int:
        """Elements of the dense weight; of several matrices, those of one."""
        return self.out_features * self.in_features

    @property
    def parameter(self) -> str:
        """The name of the parameter."""
        return self.name.removesuffix(self.label)

    @property
    def label(self) -> str:
        """The indices of its part of the parameter, if it is one. A parameter's own name may look as if it had some."""
        return "" if self.region is None else self.region.label(self.weight_shape)

    @property
    def box(self) -> tuple[range, ...]:
        """The indices of the parameter that it uses, or more."""
        return (self.region or Region.whole(self.weight_shape)).box(self.weight_shape)


@dataclass(frozen=True)
class Match:
    """One matmul node of site `site`, of all or a part of `parameter`, as `Operands` puts it.

    `weight` is the node that it multiplies with. The parameter, or its part `region`, is stored (in, out) if
    `transposed`. `matrices` is None where the weight is a matrix, and how many where it holds several.
    """

    site: str
    parameter: str
    module: GraphModule
    node: Node
    x: Node
    weight: Node
    transposed: bool
    operands: Operands
    out_features: int
    in_features: int
    region: Region | None = None
    matrices: int | None = None
    bias: Node | None = None
    addend: Node | None = None
    rows: int = 0
    rows_expr: str = "0"
    dtype: torch.dtype = torch.float32

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.out_features * self.in_features


@dataclass(frozen=True)
class Skipped:
    """A parameter of two or more dimensions that no matmul uses as its weight, and why.

    `flops` are those of the operations with it that the counter of torch knows, such as convolutions.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    lookup: bool = False  # an embedding table
    used: bool = True
    aliases: tuple[str, ...] = ()
    flops: int = 0


@dataclass(frozen=True)
class Found:
    """What `find_sites` returns: sites, the matmuls of the eligible ones, and the parameters passed over.

    `differentiates`: of a whole model, if it runs only with gradients on.
    """

    sites: tuple[Site, ...]
    matches: tuple[Match, ...]
    skipped: tuple[Skipped, ...]
    differentiates: bool = False


# ---- one matmul ----


def _match(use: Use, name: str, shape: Sequence[int], scopes: Scopes) -> Match | None:
    """The matmul that this use of a weight is, if it is one."""
    operands, out = operands_of(use.user, use.operand), value_of(use.user)
    if operands is None or out is None or out.is_nested:
        return None
    terms = (node for node in operands.given if (value := value_of(node)) is not None and value.is_floating_point())
    if not scopes.is_of_one_type(use.user, (operands.x, use.operand, operands.bias, operands.addend, *terms)):
        return None
    if use.selection is not None and operands.apart is not None:
        operands = operands.apart()
    matrix = None if operands is None else _matrix(operands, use)
    if operands is not None and matrix is not None and use.selection is not None:
        operands = selected(operands, use.selection, matrix)
        matrix = use.selection.all_of(replace(matrix, dims=matrix.dims[-2:]))
    elif matrix is not None and _is_expanded(matrix, shape):
        matrix = replace(matrix, dims=matrix.dims[1:])
    if operands is None or matrix is None or len(matrix.dims) not in (2, 3):
        return None
    if 0 in matrix.shape and 0 not in shape:  # an empty slice
        return None
    region = Region.of(matrix)
    out_features, in_features = matrix.shape[-2:]
    bias, addend = (term if isinstance(term, Node) else None for term in (operands.bias, operands.addend))
    sizes = (*scopes.hidden.get(use.user, ()), *out.shape)
    return Match(
        site=name + region.label(shape),
        parameter=name,
        module=use.module,
        node=use.user,
        x=operands.x,  # type: ignore[arg-type]  # `operands_of` has seen that it is a node
        weight=use.operand,
        transposed=matrix.is_flipped,
        operands=operands,
        out_features=out_features,
        in_features=in_features,
        region=None if region.is_all_of(shape) else region,
        matrices=matrix.shape[0] if len(matrix.dims) == 3 else None,
        bias=bias,
        addend=addend,
        rows=use.times * math.prod(map(hint, sizes)) // max(out_features, 1),
        rows_expr=str(use.times * sympy.prod(list(map(_expression, sizes))) / max(out_features, 1)),
        dtype=out.dtype,
    )


def matmuls(uses: Sequence[Use], name: str, shape: Sequence[int], scopes: Scopes) -> tuple[list[Match], list[Use]]:
    """Those of the uses of a weight that are matmuls with it, and the others.

    What takes the weight twice multiplies it with itself. Inside of torch.func's grad our operators have no gradient.
    Of a tensor that gets another shape in place it is not known what it was at the matmul.
    """
    times = Counter(use.user for use in uses)
    matches: list[Match] = []
    others: list[Use] = []
    for use in uses:
        possible = times[use.user] == 1 and use.user not in scopes.differentiated and not _is_reshaped(use, scopes)
        match = _match(use, name, shape, scopes) if possible and use.reaches(scopes.without_gradients) else None
        matches += [match] if match else []
        others += [] if match else [use]
    return matches, others


def _is_reshaped(use: Use, scopes: Scopes) -> bool:
    """Does the result of this use, or what it takes, get another shape in place?"""
    index = () if use.selection is None else (use.selection.index,)
    return not scopes.reshaped.isdisjoint((use.user, *use.user.all_input_nodes, *index))


def _matrix(operands: Operands, use: Use) -> Layout | None:
    """Where the weight as (out, in) lies in the parameter; None if it does not."""
    try:
        with Copies(use.view, use.origin) as copies:
            matrix = operands.matrix(use.view)
    except (RuntimeError, IndexError):
        return None
    return Layout.of(matrix).within(copies.origin(matrix)) if copies.shows(matrix) else None


def _is_expanded(matrix: Layout, shape: Sequence[int]) -> bool:
    """Are these several matrices only one, which all rows meet?"""
    if len(matrix.dims) != 3:
        return False
    return all(stride == 0 for _, stride in matrix.dims[0]) or (len(shape) == 2 and matrix.shape[0] == 1)


def _expression(size: object) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))  # type: ignore[call-overload]


# ---- one weight ----


def ineligible(weight: torch.Tensor) -> str | None:
    """Why this weight can never be sparse, whatever uses it; None if it can."""
    kind = type(weight.data)
    if kind.__name__ == "DTensor":
        return "the weight is sharded (DTensor)"
    if weight.is_quantized:
        return "the weight is quantised"
    if weight.is_complex():
        return "the weight is complex"
    if not weight.is_floating_point():
        return f"the weight is {_dtype_name(weight.dtype)}, not floating point"
    if weight.dtype not in FLOATS:
        return f"the weight is {_dtype_name(weight.dtype)}"
    if weight.layout is not torch.strided:
        return f"the weight has layout {weight.layout}"
    if weight.numel() == 0:
        return "the weight is empty"
    if kind is not torch.Tensor and kind.__name__ not in ("FakeTensor", "FunctionalTensor"):
        return f"the weight is a tensor subclass ({kind.__name__})"
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(node: Node) -> str:
    if node.op == "output":
        return "an output of the graph"
    return f"`{called(node)}`"


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


_ADDING = (torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm)


def _picks_rows(use: Use) -> bool:
    """Rows of a matrix, by an index."""
    known = is_call(use.user, (operator.getitem, torch.index_select), "index_select")
    return known and use.view.dim() == 2 and len(use.user.all_input_nodes) > 1


def _is_term(use: Use) -> bool:
    """Is the weight what `addmm` and its like add to the product?"""
    known = is_call(use.user, _ADDING, *(function.__name__ for function in _ADDING))
    return known and (use.user.args[:1] == (use.operand,) or use.user.kwargs.get("input") is use.operand)


def _reads_nothing(use: Use) -> bool:
    """Nodes that only look at the weight's metadata, or that nothing needs."""
    user = use.user
    if user.op not in ("call_function", "call_method") or may_write(user):
        return False
    return not user.users or only_looks(user, use.operand)


# Part of an operation's name -> why it stays dense.
_HINTS = {  # by a word in the operation's name, the first that is in it
    "conv_transpose": "a transposed convolution with groups, padding or windows that overlap or leave gaps",
    "conv": "a convolution with groups, padding or windows that overlap or leave gaps",
    "bmm": "which multiplies with several matrices in a way pixelfly does not know",
    "grouped_mm": "which multiplies with several matrices in a way pixelfly does not know",
    "view_as_complex": "which makes complex numbers of it",
    "as_strided": "which sees it as it lies in memory",
    "getitem": "with an index that pixelfly does not follow",
    "embedding": "whose max_norm writes to the table",
    "_add_batch_dim": "which gives vmap one part of it for each call",
    "autograd_function_apply": "a custom autograd.Function, whose own backward computes with the weight",
    "scan": "which takes it apart, or changes it, step by step",
    "map_impl": "which takes it apart",
    "while_loop": "which changes it",
}
# P is applied to what is stored, once per version; what is computed from it would be projected again in every call.
_COMPUTED = (
    "and the weight of a matmul is computed from that; only a stored weight becomes sparse: merge it, or "
    "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
)


_PICKED = "and a matmul takes the rows that it picks: only what is the same weight in each call becomes sparse"
BOTH_ORIENTATIONS = "the weight is used in both orientations (W and its transpose)"


def overlapping(site: str, other: str) -> str:
    if site == other:
        return "matmuls use the weight as different matrices: its dimensions in another order, or as more or fewer"
    return f"matmuls use parts of the weight that overlap: {site} and {other}"


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
            dtype=_dtype_name(first.dtype),
            device=str(self.value.device),
            uses=len(matches),
            shared=self.looked_up,
            aliases=_names_in(modules, first.site) if self.looked_up else (),
            reason=ineligible(self.value) or self._conflict(matches),
            region=first.region,
            matrices=first.matrices or 1,
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
                why = self._hint(use)
                return f"the weight is also used by {_describe(use.user)}" + (f", {why}" if why else "")
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
            return "not used in this graph"
        if not self.others:
            return f"an embedding lookup, {_PICKED}" if flops else "an embedding lookup, not a matmul"
        use = self.others[0]
        if flops and _picks_rows(use):
            return f"used by {_describe(use.user)}, {_PICKED}"
        why = self._hint(use)
        if why is None:
            why = (
                _COMPUTED
                if multiplies and not flops_of(use.user, self.scopes.hidden)
                else "not by a matmul pixelfly knows"
            )
        return f"used by {_describe(use.user)}, {why}"

    def _hint(self, use: Use) -> str | None:
        """Why this use is no matmul that may become sparse; None if there is nothing that a user could change."""
        user, value = use.user, value_of(use.user)
        if user in self.scopes.differentiated:
            return "inside of a transform of torch.func, where our kernels have no gradient"
        if user.kwargs.get("out") is not None:
            return "which writes its result to a tensor that is there"
        if _is_reshaped(use, self.scopes):
            return "and the shape of its result, or of what it takes, is changed in place, as by `squeeze_`"
        if user in self.factors:
            return "of which another parameter is taken for the weight"
        if value is not None and value.is_nested:
            return "of a nested tensor, which our kernels do not take"
        if stops_gradients(use):
            return "which no gradients go through, as with `detach` and `.data`"
        if not use.reaches(self.scopes.without_gradients):
            return "of a view or a copy that is made without gradients"
        if _is_term(use):
            return "which adds it to a product"
        if is_cast(user):
            return "a cast of what another has rounded, or to another device or kind of number"
        return next((text for word, text in _HINTS.items() if word in str(user.target)), None)


def _settle_products_of_two(weights: Collection[_Weight]) -> None:
    """In a matmul of two parameters the right one is the weight: `queries @ weight`."""
    times = Counter(match.node for weight in weights for match in weight.matches)
    for weight in weights:
        shared = [match for match in weight.matches if times[match.node] > 1]
        weight.leave_to_others({m.node for m in shared if m.weight is not m.node.all_input_nodes[-1]})


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


def _buffers(gm: GraphModule, example_inputs: Sequence[object]) -> list[Node]:
    """The placeholders of floating-point buffers: a weight may be computed with them, as in spectral norm."""
    return [
        node
        for node, value in zip(placeholders(gm), example_inputs, strict=False)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "_buffers" in (source_name(node) or "")
    ]


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
    weights = {
        node: _Weight(gm, node, value, names[node.name], scopes)
        for node, value in parameters.items()
        if value.dim() >= 2
    }
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
        if not weight.matches
    ]
    return Found(tuple(sites), tuple(match for match in matches if match.site in eligible), tuple(skipped))
