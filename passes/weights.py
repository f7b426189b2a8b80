"""The weight side of a graph: what a parameter is called, and which nodes use it, or a part of it, and how.

A weight reaches its matmul through transposes, slices, chunks, views, copies and casts. All but casts only show its
elements, so that one description holds for all of them: the `Layout` of what arrives. It is found by repeating each
operation on a tensor without data, whatever the operation is called. That tensor asks for gradients, and so tells where
they stop.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from pixelfly_compiler.passes.regions import Copies, Layout, Steps

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- names ----

# A decorated forward gets its module as args[0].
_ROOT = re.compile(r"^[LG]\['([^']*)'\](?:(?<=\['args'\])\[0\])?")
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
    name = ".".join(_tokens(_CLOSURE.sub("", rest)))
    base = root.group(1) if root else source
    return base, name or base


def _tokens(source: str) -> list[str]:
    tokens = (next(part for part in match if part) for match in _TOKEN.findall(source))
    return [token for token in tokens if token not in _PLUMBING]


def placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def parameter_names(
    gm: GraphModule, example_inputs: Sequence[object], own: Mapping[int, str] | None = None
) -> dict[str, str]:
    """Placeholder name -> parameter name, for every placeholder whose example input is a parameter. No two are equal.

    Names are relative to the module Dynamo saw as `self`; parameters of one name are told apart by their roots, or by
    all of the way to them. `own`: names that are known, by the parameter's id.
    """
    spellings = {
        node.name: (own[id(value)],) if own and id(value) in own else _spellings(node)
        for node, value in zip(placeholders(gm), example_inputs, strict=False)
        if isinstance(value, nn.Parameter)
    }
    names = {key: words[0] for key, words in spellings.items()}
    for place in range(1, 4):
        times = Counter(names.values())
        names = {
            key: name if times[name] == 1 else spellings[key][min(place, len(spellings[key]) - 1)]
            for key, name in names.items()
        }
    return names


def _spellings(node: Node) -> tuple[str, ...]:
    """What a placeholder may be called, shortest first: a graph has no other of the last."""
    source = source_name(node)
    if not source:
        return (node.name,)
    root, name = qualified_name(source)
    return name, f"{root}.{name}", ".".join([source[0], *_tokens(source)]), node.name


def own_name(name: str) -> str:
    """A parameter's name as if no module of the model were compiled by itself."""
    return name.replace("_orig_mod.", "")


def parameter_names_by_identity(gm: GraphModule, example_inputs: Sequence[object], model: nn.Module) -> dict[str, str]:
    """As `parameter_names`, but with the model's own names, also where Dynamo saw only one of its submodules."""
    own = {id(parameter): own_name(name) for name, parameter in model.named_parameters()}
    return parameter_names(gm, example_inputs, own)


# ---- from a parameter to the nodes that use it ----


@dataclass(frozen=True)
class Selection:
    """Matrices of a weight that an index from data picks out of `count`, which lie as the `steps` say."""

    index: Node
    several: bool
    steps: Steps
    count: int

    def all_of(self, layout: Layout) -> Layout:
        """Of all matrices what `layout` is of the first."""
        return Layout((self.steps, *layout.dims), layout.offset)


@dataclass(frozen=True)
class Use:
    """One node that consumes the weight as `operand`: the `view` of it, on the meta device. A loop runs it `times`.

    `origin`: what the memory of the view is a copy of, None if it is the parameter's. Of what a selection picks, it is
    a view of the first matrix.
    """

    module: GraphModule
    user: Node
    operand: Node
    view: Tensor
    origin: Layout | None = None
    times: int | torch.SymInt = 1
    selection: Selection | None = None

    @property
    def layout(self) -> Layout | None:
        """All that may be used; None if that is not known."""
        layout = Layout.of(self.view).within(self.origin)
        return layout if layout is None or self.selection is None else self.selection.all_of(layout)

    def reaches(self, without_gradients: Collection[Node]) -> bool:
        """Do the gradients of what the node computes reach the weight? A view made under `no_grad` is in their way."""
        node = self.operand
        while self.user not in without_gradients and node.op != "placeholder":
            if node in without_gradients:
                return False
            node = node.all_input_nodes[0]
        return True


def value_of(node: object) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def storages(value: Any) -> set[int]:
    """The storages of all tensors in a value. Under a transform of torch.func it is the wrapped tensor that has one; a
    sparse tensor has none.
    """
    found = set()
    for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        with contextlib.suppress(NotImplementedError, RuntimeError):
            found.add(tensor.untyped_storage()._cdata)
    return found


def memory_of(node: object) -> set[int]:
    """The storages of what a node computes."""
    return storages(node.meta.get("example_value")) if isinstance(node, Node) else set()


def is_call(node: Node, functions: Sequence[object], *methods: str) -> bool:
    """Is the node a call of one of these, or, as in graphs of `torch.export`, of aten's operator of the same name?"""
    if node.op == "call_method":
        return node.target in methods
    if namespace(node) == "aten":
        return called(node) in (*methods, *(getattr(function, "__name__", "") for function in functions))
    return node.op == "call_function" and any(node.target is function for function in functions)


def namespace(node: Node) -> str | None:
    """Of the operator that the node calls, `torch.ops.aten.mm` or `.mm.default`; None if it calls something else."""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return packet._qualified_op_name.partition("::")[0] if isinstance(packet, OpOverloadPacket) else None


def is_tagged(node: Node, tag: torch.Tag) -> bool:
    """Has aten's operator of the name that the node calls, or one of its overloads, this mark?"""
    packet = getattr(torch.ops.aten, called(node), None)
    if not isinstance(packet, OpOverloadPacket):
        return False
    return any(tag in getattr(packet, overload).tags for overload in packet.overloads())


def called(node: Node) -> str:
    """The name of the function, operator or method that the node calls."""
    if isinstance(node.target, OpOverload):
        return node.target.overloadpacket.__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def arguments(node: Node, names: Sequence[str]) -> list[Any]:
    """Positional or keyword arguments by name; None where absent."""
    given = dict(zip(names, node.args, strict=False))
    return [given.get(name, node.kwargs.get(name)) for name in names]


def may_write(node: Node) -> bool:
    """May this node write to an argument? By its schema, or its name, as PyTorch's are: `mul_`, `setitem`, `iadd`."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = called(node)
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "setitem"
    of_python = name.startswith("i") and getattr(operator, name, None) is node.target
    by_request = node.kwargs.get("out") is not None or bool(node.kwargs.get("inplace"))
    if is_call(node, (F.embedding, F.embedding_bag)):
        by_request = (node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")) is not None
    return in_place or of_python or by_request or isinstance(node.target, HigherOrderOperator)


_LIKE = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like)
_NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_TURNED_INTO = ("to", "type_as", "view_as", "expand_as", "reshape_as")


def only_looks(user: Node, operand: Node) -> bool:
    """Does this operation ask only what shape, type or device the operand has: `w.new_zeros(n)`, `x.type_as(w)`?"""
    made, turned = is_call(user, _LIKE, *_NEW), is_call(user, (), *_TURNED_INTO)
    place = 0 if made else 1
    if not (made or turned) or len(user.args) <= place or user.args[place] is not operand:
        return False
    return tree_leaves((user.args, user.kwargs)).count(operand) == 1


def uses(module: GraphModule, node: Node, shape: Sequence[int]) -> Iterator[Use]:
    """Every use of the parameter of this shape that `node` carries."""
    value = value_of(node)
    dtype = value.dtype if value is not None and value.is_floating_point() else torch.float32
    view = torch.empty(tuple(shape), dtype=dtype, device="meta")
    yield from _uses(module, Use(module, node, node, view))


def _uses(module: GraphModule, use: Use) -> Iterator[Use]:
    """Follow what `use.user` shows through views, copies, casts and selections, and, as long as none of these is made,
    into sub-graphs.
    """
    node = use.user
    for user in node.users:
        here = replace(use, module=module, user=user, operand=node)
        if use.selection is None and (inside := sub_graphs(module, user)) is not None:
            for body, inner in inside.carrying(node):
                yield from _uses(body, replace(use, user=inner, times=use.times * inside.times))
            if tree_leaves(user.args).count(node) > inside.operands.count(node):
                yield here
        elif _is_cast_copy(user, node, use.view.dtype):
            yield from _uses(module, here)
        elif use.selection is None and (picked := _selection(here)) is not None:
            view = use.view[:1] if picked.several else use.view[0]
            yield from _uses(module, replace(here, view=view, selection=picked))
        elif isinstance(seen := _seen_through(here), Use):
            yield from _uses(module, seen)
        elif seen is not None:
            for item in user.users:  # chunks of the weight: each is taken out by an index
                if is_call(item, (operator.getitem,)) and isinstance(item.args[1], int):
                    yield from _uses(module, replace(seen[item.args[1]], user=item, operand=user))
                else:
                    yield replace(here, user=item, operand=user)
        else:
            yield here


def _selection(use: Use) -> Selection | None:
    """`w[i]` and `w.index_select(0, i)` with i from data: one index, or a list of them, into the first dimension."""
    user, node, index = use.user, use.operand, None
    if is_call(user, (operator.getitem,)) and user.args[0] is node:
        index = user.args[1][0] if isinstance(user.args[1], tuple) and len(user.args[1]) == 1 else user.args[1]
    elif is_call(user, (torch.index_select,), "index_select"):
        source, dim, of_first = arguments(user, ("input", "dim", "index"))
        index = of_first if source is node and dim == 0 else None
    if not isinstance(index, Node) or use.view.dim() != 3 or use.layout is None:
        return None
    value = index.meta.get("example_value")
    if isinstance(value, Tensor) and (value.dim() > 1 or value.dtype not in (torch.int32, torch.int64)):
        return None
    if not isinstance(value, Tensor | torch.SymInt):
        return None
    several = isinstance(value, Tensor) and value.dim() == 1
    return Selection(index, several, use.layout.dims[0], use.view.shape[0])


def is_cast(user: Node) -> bool:
    return is_call(user, (), "to", "type", "float", "double", "bfloat16", "half", "type_as")


def _is_cast_copy(user: Node, node: Node, own: torch.dtype) -> bool:
    """The weight's values in another floating-point type; gradients go through.

    `own` is the parameter's type. A matmul in the last type gets P(W) in that type, so nothing may be rounded before.
    """
    if not is_cast(user) or user.args[:1] != (node,):
        return False
    before, after = value_of(node), value_of(user)
    if before is None or after is None or before.device != after.device:
        return False
    rounded = before.dtype != own and before.dtype.itemsize <= own.itemsize
    return after.dtype in FLOATS and (after.dtype == before.dtype or not rounded)


def _seen_through(use: Use) -> Use | list[Use] | None:
    """`use` with the view that its node gives of what it takes, or several. None if it is no view of it and no copy, or
    stops gradients.
    """
    result, copies = _repeated_on(use)
    parts = result if isinstance(result, tuple | list) else [result]
    if not parts or not all(_is_view_of(part, use.view, copies) and part.requires_grad for part in parts):
        return None
    shown = [replace(use, view=part, origin=copies.origin(part)) for part in parts]
    return shown if isinstance(result, tuple | list) else shown[0]


def stops_gradients(use: Use) -> bool:
    """Is it a view of the weight that no gradients go through, whether or not any are asked for?"""
    result, copies = _repeated_on(use)
    return _is_view_of(result, use.view, copies) and not result.requires_grad


def _repeated_on(use: Use) -> tuple[Any, Copies]:
    """What the node makes of the view, which asks for gradients, in place of its operand; None if that is not known.
    And which memory shows the view then.
    """
    user, node, copies = use.user, use.operand, Copies(use.view, use.origin)
    if user.op not in ("call_function", "call_method") or may_write(user):
        return None, copies
    if user.all_input_nodes != [node] and not _is_repeated(user, node):
        return None, copies
    if any(isinstance(argument, torch.dtype) for argument in (*user.args, *user.kwargs.values())):
        return None, copies  # the same bytes as other numbers
    if is_call(user, (torch.as_strided,), "as_strided") and not _is_laid_out_as(value_of(node), use.view):
        return None, copies
    function = getattr(torch.Tensor, user.target, None) if isinstance(user.target, str) else user.target
    try:
        with torch.inference_mode(False), torch.enable_grad():
            own = use.view.detach().requires_grad_()
            # How often a view is repeated may be symbolic, and does not matter.
            args, kwargs = torch.fx.node.map_arg((user.args, user.kwargs), lambda source: own if source is node else 2)
            with copies:
                result = function(*args, **kwargs)  # type: ignore[misc]
    except Exception:  # no view, whatever it is
        return None, copies
    # A cast that returns its input: the node has been cast before, the view, of the parameter's type, has not.
    unchanged = result is own and called(user) != "contiguous"
    return (None if unchanged else result), copies


def _is_repeated(user: Node, node: Node) -> bool:
    """Does this view repeat a weight as often as a symbolic size says?"""
    sizes = [source.meta.get("example_value") for source in user.all_input_nodes if source is not node]
    known = is_call(user, (torch.broadcast_to,), "expand", "broadcast_to")
    return known and all(isinstance(size, torch.SymInt) for size in sizes)


def _is_laid_out_as(value: Tensor | None, view: Tensor) -> bool:
    """Does the model's tensor lie in memory as its stand-in does? No operation but `as_strided` sees that."""
    if value is None or value.shape != view.shape:
        return False
    return value.stride() == view.stride() and value.storage_offset() == view.storage_offset()


def _is_view_of(result: object, view: Tensor, copies: Copies) -> bool:
    """A tensor of the same numbers, in the same memory or copied from there."""
    if not isinstance(result, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(result):
        return False
    if result.dtype != view.dtype or result.is_neg() != view.is_neg():  # `view` is real: no conjugate is of its type
        return False
    return copies.shows(result)


# ---- sub-graphs ----


@dataclass(frozen=True)
class SubGraphs:
    """The bodies that a higher-order operator runs. `operands` are what each of their placeholders stands for, in
    order; None for what a body does not get as it is: a value that a loop carries, or a slice.

    A body runs `times` times, 1 where only data knows.
    """

    bodies: tuple[GraphModule, ...]
    operands: tuple[object, ...]
    times: int | torch.SymInt = 1

    def carrying(self, node: Node) -> Iterator[tuple[GraphModule, Node]]:
        """Every body with its placeholder for `node`."""
        for body in self.bodies:
            for operand, inner in zip(self.operands, placeholders(body), strict=False):
                if operand is node:
                    yield body, inner


@dataclass(frozen=True)
class _Layout:
    """Which arguments are the bodies, and which are lists of what a loop carries or slices, or of plain operands."""

    bodies: tuple[int, ...]
    changing: tuple[int, ...]
    plain: int


_CHECKPOINTS = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")
_LAYOUTS = {
    "cond": _Layout((1, 2), (), 3),
    "while_loop": _Layout((0, 1), (2,), 3),
    "scan": _Layout((0,), (1, 2), 3),
    "map_impl": _Layout((0,), (1,), 2),
}
_SLICED = {"scan": 2, "map_impl": 1}  # the argument whose tensors have a slice for each run


def sub_graphs(module: GraphModule, node: Node) -> SubGraphs | None:
    """The bodies of an activation checkpoint, a branch or a loop, if they are run here and nowhere else.

    Not those of an `autograd.Function`: its backward is written for the weight as it is.
    """
    if not isinstance(node.target, HigherOrderOperator):
        return None
    name = node.target.name()
    layout = _LAYOUTS.get(name)
    if layout is None and name not in _CHECKPOINTS:
        return None
    bodies = [_body(module, node.args[place]) for place in (layout.bodies if layout else (0,))]
    if any(body is None for body in bodies):
        return None
    found = tuple(body for body in bodies if body is not None)
    if layout is None:
        return SubGraphs(found, node.args[1:])
    changing = [None for place in layout.changing for _ in _listed(node, place)]
    sliced = _listed(node, _SLICED[name]) if name in _SLICED else ()
    value = value_of(sliced[0]) if sliced else None
    times = 1 if value is None else value.shape[0]
    return SubGraphs(found, (*changing, *_listed(node, layout.plain)), times)


def set_operands(call: Node, operands: Sequence[object]) -> None:
    """Give the bodies that `call` runs these `SubGraphs.operands`."""
    layout = _LAYOUTS.get(call.target.name())  # type: ignore[union-attr]
    if layout is None:
        call.args = (call.args[0], *operands)  # type: ignore[arg-type]
    else:
        changing = sum(len(_listed(call, place)) for place in layout.changing)
        kind = tuple if isinstance(call.args[layout.plain], tuple) else list  # they are particular about it
        call.update_arg(layout.plain, kind(operands[changing:]))  # type: ignore[arg-type]


def _listed(node: Node, place: int) -> tuple[object, ...]:
    argument = node.args[place]
    return tuple(argument) if isinstance(argument, tuple | list) else ()


def _body(module: GraphModule, attribute: object) -> GraphModule | None:
    if not isinstance(attribute, Node) or attribute.op != "get_attr" or len(attribute.users) != 1:
        return None
    body = getattr(module, str(attribute.target), None)
    return body if isinstance(body, GraphModule) else None
