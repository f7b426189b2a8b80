"""Find sites: the matmuls of a Dynamo graph whose one operand is a parameter.

    def forward(self, x, weight, bias):              Site("fc.weight", out=128, in=64, rows=32, transposed=True)
        x1 = x.view(-1, 64)                  -->     Match("fc.weight", node=addmm, x=x1, weight=weight, bias=bias)
        y = torch.addmm(bias, x1, weight)

A `Site` is a value: one per weight, however many matmuls use it. A `Match` is one matmul node of the graph, with what a
rewrite needs. A weight that cannot become sparse is a site with a reason (it still counts in the budget). A parameter
of two or more dimensions that no matmul uses is `Skipped`, with a reason. Nothing is dropped silently.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from pixelfly_compiler.passes.roles import assign_roles

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class SiteConfig:
    """How a site is made sparse: `block` x `block` blocks at the first `strides` strides, and a term of rank `rank`."""

    block: int
    strides: int
    rank: int


@dataclass(frozen=True)
class Site:
    """One weight and the matmuls that use it. `rows` is the hint of the symbolic `rows_expr`, their rows together."""

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
    nodes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def elements(self) -> int:
        """Elements of the dense weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Match:
    """One matmul node of site `site`.

    `weight` is the placeholder, in the graph of `node`, that carries the weight: (in, out) if `transposed`.
    The node computes x @ W^T (+ bias) with x (..., in), or, if `left`, W @ x with x (..., in, columns) or (in,).
    `addend` is a bias that is no vector of length `out` (addmm's general first argument); add it to the result.
    """

    site: str
    module: GraphModule
    node: Node
    x: Node
    weight: Node
    transposed: bool
    bias: Node | None = None
    addend: Node | None = None
    left: bool = False
    rows: int = 0
    rows_expr: str = "0"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Skipped:
    """A parameter of two or more dimensions that no matmul uses as its weight, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    lookup: bool = False  # an embedding table
    used: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What `find_sites` returns: sites, the matmuls of the eligible ones, and the parameters passed over."""

    sites: tuple[Site, ...]
    matches: tuple[Match, ...]
    skipped: tuple[Skipped, ...]


# ---- names ----

_ROOT = re.compile(r"^[LG]\['([^']*)'\]")
_TOKEN = re.compile(r"\['([^']*)'\]|\[\"([^\"]*)\"\]|\[(-?\d+)\]|\.([A-Za-z_]\w*)")
_PLUMBING = {"_modules", "_parameters", "_orig_mod", "__dict__", "cell_contents", "__self__"}
_CLOSURE = re.compile(r"\.__closure__\[\d+\]")


def source_name(node: Node) -> str | None:
    """Dynamo's name of where a placeholder comes from: a string or a method, by version."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    return name() if callable(name) else name


def qualified_name(source: str) -> tuple[str, str]:
    """(root, name): L['self']._modules['h']._modules['0'].lin.weight -> ("self", "h.0.lin.weight")."""
    root = _ROOT.match(source)
    rest = source[root.end() :] if root else source
    tokens = [next(part for part in match if part) for match in _TOKEN.findall(_CLOSURE.sub("", rest))]
    name = ".".join(token for token in tokens if token not in _PLUMBING)
    base = root.group(1) if root else source
    return base, name or base


def placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def parameter_names(gm: GraphModule, example_inputs: Sequence[object]) -> dict[str, str]:
    """Placeholder name -> parameter name, for every placeholder whose example input is a parameter.

    Names are relative to the module Dynamo saw as `self`; two roots with a parameter of the same name keep their root.
    """
    found: dict[str, tuple[str, str]] = {}
    for node, value in zip(placeholders(gm), example_inputs, strict=False):
        if isinstance(value, nn.Parameter):
            source = source_name(node)
            found[node.name] = qualified_name(source) if source else ("", node.name)
    names = [name for _, name in found.values()]
    return {key: name if names.count(name) == 1 else f"{root}.{name}" for key, (root, name) in found.items()}


def parameter_names_by_identity(gm: GraphModule, example_inputs: Sequence[object], model: nn.Module) -> dict[str, str]:
    """As `parameter_names`, but with the model's own names, also where Dynamo saw only one of its submodules."""
    own = {id(parameter): name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}
    names = parameter_names(gm, example_inputs)
    for node, value in zip(placeholders(gm), example_inputs, strict=False):
        if id(value) in own:
            names[node.name] = own[id(value)]
    return names


# ---- the weight side: from a parameter to the nodes that use it ----


@dataclass(frozen=True)
class Use:
    """One node that consumes the weight; `flipped` if what it consumes is the transpose of the parameter."""

    module: GraphModule
    user: Node
    operand: Node
    weight: Node
    flipped: bool
    weight_flipped: bool


def _value(node: object) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _is_call(node: Node, functions: Sequence[object], *methods: str) -> bool:
    if node.op == "call_function":
        return any(node.target is function for function in functions)
    return node.op == "call_method" and node.target in methods


def _swaps_two_dims(node: Node) -> bool:
    """Is this node the transpose of its two-dimensional input?"""
    if _is_call(node, (torch.t, torch.adjoint), "t", "adjoint"):
        return True
    if _is_call(node, (getattr,)) and node.args[1] in ("T", "mT", "H", "mH"):
        return True
    if _is_call(node, (torch.transpose, torch.swapaxes, torch.swapdims), "transpose", "swapaxes", "swapdims"):
        dims = [*node.args[1:], *node.kwargs.values()]
        return len(dims) == 2 and all(isinstance(d, int) for d in dims) and {int(str(d)) % 2 for d in dims} == {0, 1}
    if _is_call(node, (torch.permute,), "permute"):
        dims = list(node.args[1]) if isinstance(node.args[1], tuple | list) else list(node.args[1:])
        return [int(str(d)) % 2 for d in dims] == [1, 0]
    return False


def _is_identity(node: Node) -> bool:
    """A node that returns the weight as it is: `contiguous`, `.to(its own dtype)`."""
    if _is_call(node, (), "contiguous"):
        return True
    before, after = _value(node.args[0] if node.args else None), _value(node)
    if before is None or after is None or not _is_call(node, (), "to", "float", "bfloat16", "half", "type_as"):
        return False
    return before.dtype == after.dtype and before.device == after.device


def _carried(node: Node) -> Node:
    """What a chain of transposes starts from."""
    while (_swaps_two_dims(node) or _is_identity(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


_CHECKPOINTS = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")


def _checkpoint_body(module: GraphModule, node: Node) -> GraphModule | None:
    """The body of an activation checkpoint called here and nowhere else; its placeholders are args[1:], in order."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.name() not in _CHECKPOINTS:
        return None
    attribute = node.args[0] if node.args else None
    if not isinstance(attribute, Node) or attribute.op != "get_attr" or len(attribute.users) != 1:
        return None
    body = getattr(module, str(attribute.target), None)
    return body if isinstance(body, GraphModule) else None


def uses_of(module: GraphModule, node: Node, weight: Node, flipped: bool, weight_flipped: bool) -> Iterator[Use]:
    """Follow the weight through transposes and into activation checkpoints."""
    for user in node.users:
        if _swaps_two_dims(user):
            yield from uses_of(module, user, weight, not flipped, weight_flipped)
        elif _is_identity(user):
            yield from uses_of(module, user, weight, flipped, weight_flipped)
        elif (body := _checkpoint_body(module, user)) is not None:
            for argument, inner in zip(user.args[1:], placeholders(body), strict=False):
                if argument is node:
                    yield from uses_of(body, inner, inner, flipped, flipped)
        else:
            yield Use(module, user, node, weight, flipped, weight_flipped)


# ---- the matmul side: which operand is the weight ----


@dataclass(frozen=True)
class _Operands:
    x: object
    weight: object
    bias: object = None
    weight_is_in_out: bool = False
    left: bool = False


def _linear(node: Node, operand: Node) -> _Operands | None:
    if not _is_call(node, (F.linear, torch._C._nn.linear)):
        return None
    x, weight, bias = _arguments(node, ("input", "weight", "bias"))
    return _Operands(x, weight, bias)


def _addmm(node: Node, operand: Node) -> _Operands | None:
    if not _is_call(node, (torch.addmm,), "addmm"):
        return None
    if any(node.kwargs.get(key, 1) != 1 for key in ("beta", "alpha")):
        return None
    bias, left, right = _arguments(node, ("input", "mat1", "mat2"))
    # A weight on the left would need the bias along the other dimension; nobody writes it.
    return _Operands(left, right, bias, weight_is_in_out=True)


_MATMULS = (torch.mm, torch.matmul, operator.matmul, torch.mv)


def _matmul(node: Node, operand: Node) -> _Operands | None:
    if not _is_call(node, _MATMULS, "mm", "matmul", "__matmul__", "mv"):
        return None
    left, right, *_ = [*node.args, *node.kwargs.values()]
    if right is operand:
        return _Operands(left, right, weight_is_in_out=True)
    return _Operands(right, left, left=True)


def _arguments(node: Node, names: Sequence[str]) -> list[object]:
    """Positional or keyword arguments by name; None where absent."""
    given = dict(zip(names, node.args, strict=False))
    return [given.get(name, node.kwargs.get(name)) for name in names]


PATTERNS: tuple[Callable[[Node, Node], _Operands | None], ...] = (_linear, _addmm, _matmul)


def _match(use: Use, site: str) -> Match | None:
    """The matmul that this use of a weight is, if it is one."""
    for pattern in PATTERNS:
        operands = pattern(use.user, use.operand)
        if operands is not None and operands.weight is use.operand:
            return _build_match(use, site, operands)
    return None


def matmuls(uses: Iterable[Use], site: str) -> tuple[list[Match], list[Use]]:
    """Those of a weight's uses that are matmuls with it, and the others."""
    matches: list[Match] = []
    others: list[Use] = []
    for use in uses:
        match = _match(use, site)
        matches += [match] if match else []
        others += [] if match else [use]
    return matches, others


def _build_match(use: Use, site: str, operands: _Operands) -> Match | None:
    x, out, weight = operands.x, _value(use.user), _value(use.operand)
    if not isinstance(x, Node) or _carried(x) is use.weight or out is None or weight is None or weight.dim() != 2:
        return None
    x_value = _value(x)
    if x_value is None:
        return None
    contracted = -2 if operands.left and x_value.dim() > 1 else -1
    sizes = [size for dim, size in enumerate(x_value.shape) if dim != x_value.dim() + contracted]
    bias = operands.bias if isinstance(operands.bias, Node) else None
    bias_value = _value(bias)
    is_vector = bias_value is not None and bias_value.dim() == 1 and bias_value.shape[0] == out.shape[-1]
    return Match(
        site=site,
        module=use.module,
        node=use.user,
        x=x,
        weight=use.weight,
        # The operand is (in, out) or (out, in); each transpose between it and the placeholder flips that.
        transposed=operands.weight_is_in_out ^ (use.flipped ^ use.weight_flipped),
        bias=bias if is_vector else None,
        addend=None if is_vector else bias,
        left=operands.left,
        rows=math.prod(_hint(size) for size in sizes),
        rows_expr=str(sympy.prod([_expression(size) for size in sizes])),
        dtype=out.dtype,
    )


def _expression(size: object) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))  # type: ignore[call-overload]


def _hint(size: object) -> int:
    """A number for a size that may be symbolic: the value seen while tracing, 1 if there is none."""
    if not isinstance(size, torch.SymInt):
        return int(size)  # type: ignore[call-overload]
    try:
        hint = size.node.hint
    except Exception:  # unbacked sizes raise, of a class that differs by version
        hint = None
    return 1 if hint is None else int(hint)


# ---- together ----


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
    if kind is not torch.Tensor and kind.__name__ not in ("FakeTensor", "FunctionalTensor", "Parameter"):
        return f"the weight is a tensor subclass ({kind.__name__})"
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(node: Node) -> str:
    if node.op == "output":
        return "an output of the graph"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"`{target}`"


def _is_lookup(use: Use) -> bool:
    """An embedding lookup in this table: it stays dense, and does not stop the weight from being a site."""
    user = use.user
    if _is_call(user, (F.embedding, torch.embedding)):
        return use.operand in user.args[:2] or user.kwargs.get("weight") is use.operand
    return _is_call(user, (F.embedding_bag,)) and use.operand is not user.kwargs.get("per_sample_weights")


def _is_dead(use: Use) -> bool:
    """Nodes that only look at the weight's metadata."""
    return not use.user.users and use.user.op in ("call_function", "call_method")


def _site_of_weight(gm: GraphModule, node: Node, weight: torch.Tensor, name: str) -> tuple[Site | Skipped, list[Match]]:
    shape = tuple(int(size) for size in weight.shape)
    uses = [use for use in uses_of(gm, node, node, False, False) if not _is_dead(use)]
    matches, rest = matmuls(uses, name) if weight.dim() == 2 else ([], uses)
    others = [use for use in rest if not _is_lookup(use)]
    if not matches:
        return Skipped(
            name, shape, _why_no_matmul(weight, uses, others), lookup=bool(uses) and not others, used=bool(uses)
        ), []
    orientations = {_stored_in_out(match, uses) for match in matches}
    transposed = _stored_in_out(matches[0], uses)
    reason = ineligible(weight)
    if reason is None and others:
        reason = f"the weight is also used by {_describe(others[0].user)}"
    if reason is None and len(orientations) == 2:
        reason = "the weight is used in both orientations (W and its transpose)"
    out_features, in_features = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    shared = len(uses) > len(matches) + len(others)
    site = Site(
        name=name,
        weight_shape=shape,
        out_features=out_features,
        in_features=in_features,
        transposed=transposed,
        rows=sum(match.rows for match in matches),
        rows_expr=str(sum((sympy.sympify(match.rows_expr) for match in matches), sympy.Integer(0))),
        role="",
        dtype=_dtype_name(matches[0].dtype),
        device=str(weight.device),
        uses=len(matches),
        shared=shared,
        aliases=_names_at_use(name, matches) if shared else (),
        reason=reason,
        nodes=tuple(match.node.name for match in matches),
    )
    return site, matches


def _names_at_use(name: str, matches: Sequence[Match]) -> tuple[str, ...]:
    """What the modules that multiply with a tied weight call it: `lm_head.weight` for `wte.weight`."""
    names: dict[str, None] = {}
    for match in matches:
        stack = list((match.node.meta.get("nn_module_stack") or {}).values())
        if stack:
            root, module = qualified_name(stack[-1][0])
            names[("" if module == root else f"{module}.") + name.rpartition(".")[2]] = None
    return tuple(other for other in names if other != name)


def _stored_in_out(match: Match, uses: Sequence[Use]) -> bool:
    """Is the parameter itself (not the node that carries it into a checkpoint) stored (in, out) for this matmul?"""
    flipped = next(use.weight_flipped for use in uses if use.user is match.node and use.weight is match.weight)
    return match.transposed ^ flipped


def _why_no_matmul(weight: torch.Tensor, uses: Sequence[Use], others: Sequence[Use]) -> str:
    reason = ineligible(weight)
    if reason is not None:
        return reason
    if not uses:
        return "not used in this graph"
    if not others:
        return "an embedding lookup, not a matmul"
    return f"used by {_describe(others[0].user)}, not by a matmul pixelfly knows"


def find_sites(gm: GraphModule, example_inputs: Sequence[object], names: Mapping[str, str] | None = None) -> Found:
    """Sites, matches and skipped parameters of a Dynamo graph.

    `names` maps placeholder names to parameter names; by default `parameter_names(gm, example_inputs)`. A placeholder
    that is not in it is no weight. The graph is not changed.
    """
    names = parameter_names(gm, example_inputs) if names is None else names
    sites: list[Site] = []
    matches: list[Match] = []
    skipped: list[Skipped] = []
    nodes: dict[str, list[Node]] = {}
    for node, value in zip(placeholders(gm), example_inputs, strict=False):
        if node.name not in names or not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        site, found = _site_of_weight(gm, node, value, names[node.name])
        if isinstance(site, Skipped):
            skipped.append(site)
            continue
        sites.append(site)
        nodes[site.name] = [match.node for match in found]
        if site.reason is None:
            matches += found
    roles = assign_roles(gm, [(site.name, site.weight_shape, nodes[site.name]) for site in sites])
    sites = [replace(site, role=roles[site.name]) for site in sites]
    return Found(tuple(sites), tuple(matches), tuple(skipped))
