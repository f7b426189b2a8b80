"""A sparse model as an `ExportedProgram`, and as one file that runs without this package.

    model --torch.export--> aten graph --plan, rewrite--> graph with pixelfly:: ops and compact weights
          --torch.export--> ExportedProgram --AOTInductor with our lowerings--> model.pt2

Unlike compiled code, an exported program holds its weights: projected and packed here, once. So it is for inference.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from pixelfly_compiler.backend import (
    cache_tag,
    dense_if_settled,
    dense_without_kernels,
    has_kernels,
    settled_weights,
    sparse_configs,
    weight_positions,
)
from pixelfly_compiler.capture import aliases, with_aliases
from pixelfly_compiler.compact import CompactInputs, CompactWeights
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.errors import ExportError
from pixelfly_compiler.oracle import project
from pixelfly_compiler.passes.attention import replace_attention
from pixelfly_compiler.passes.exported import as_dynamo_writes, as_export_runs, mark_parameter
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.fold_densify import DENSIFY, fold_densify
from pixelfly_compiler.passes.open import open_composites
from pixelfly_compiler.passes.rewrite import CompactInput, erase_unused, rewrite
from pixelfly_compiler.passes.sites import Found
from pixelfly_compiler.passes.split import split_joined_weights
from pixelfly_compiler.passes.weights import called, parameter_names_by_identity, placeholders
from pixelfly_compiler.plan import make_plan
from pixelfly_compiler.report import announcer

log = logging.getLogger("pixelfly_compiler")

Shapes = dict[str, Any] | tuple[Any, ...] | list[Any] | None


def export(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Shapes = None,
    **options: Any,
) -> ExportedProgram:
    """`torch.export.export(model, args, kwargs, dynamic_shapes=...)` with the planned matmuls made sparse.

    `args` is a tuple, or one tensor; `options` are those of `Config`: budget=0.25, plan=, ... The program computes what
    `project_(model, plan)` does; its buffers `<weight>_blocks`, `_u`, `_v`, `_index` stand for the planned weights,
    which are not in it. What cannot take these gets P(W) as `<weight>_projected`, with a warning. A compact model keeps
    its factors, with gamma multiplied in. Attention is ours where it is the faster one on this processor. The model is
    not changed.

    `torch.export.load` of such a program needs this package, for the operators; what `package` makes of it does not.
    """
    config, others = Config.from_options(options)
    if others:
        raise TypeError(f"export() got an unexpected option {next(iter(others))!r}")
    model = getattr(model, "_orig_mod", model)
    example = tuple(args) if isinstance(args, tuple | list) else (args,), dict(kwargs or {})
    dense = torch.export.export(model, *example, dynamic_shapes=dynamic_shapes)
    sparse = _Lifted(dense.module())
    if replace_attention(split_joined_weights(open_composites(sparse.gm))):
        _reshape_instead_of_view(sparse.gm)
    folded = sparse.fold()
    made = sparse.rewrite(model, config, asked=bool(options))
    if not folded and not made.sparse:
        announcer.nothing_sparse(made)
    return torch.export.export(sparse.module(), *example, dynamic_shapes=dynamic_shapes)


def package(program: ExportedProgram, path: str | Path, *, inductor_configs: Mapping[str, Any] | None = None) -> Path:
    """Compile what `export` returned ahead of time into one file, `path` (.pt2), for this machine's kind of processor.

    `torch._inductor.aoti_load_package(path)` loads it, with torch and without this package. `inductor_configs` are
    AOTInductor's. Raises `ExportError` where something of this package would be needed to run it.
    """
    from pixelfly_compiler.kernels import lowering

    if Path(path).suffix != ".pt2":
        raise ExportError(f"{str(path)!r} is no name of a package", next_step="give it the suffix .pt2")
    lowering.register()
    with cache_tag():
        written = torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=dict(inductor_configs or {})
        )
    _check_stands_alone(Path(written))
    return Path(written)


def _check_stands_alone(path: Path) -> None:
    """What a package calls beyond its own code and torch's C interface is listed in it."""
    with zipfile.ZipFile(path) as content:
        lists = [content.read(name) for name in content.namelist() if name.endswith("extern_kernel_nodes.json")]
    if any(b"pixelfly::" in listed for listed in lists):
        path.unlink()
        raise ExportError(
            "an operator of pixelfly has no kernel for this program, and its reference is not in the package",
            next_step="make the program with pixelfly_compiler.export, in float32, bfloat16 or float16",
        )


def _reshape_instead_of_view(gm: GraphModule) -> None:
    """The graph was traced with the strides of PyTorch's attention, which before 2.13 are not those of ours."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
                node.target = torch.ops.aten.reshape.default
            module.recompile()


class _Lifted:
    """The graph of an exported module with its tensors as inputs, as the passes expect them: placeholders behind those
    of the user, whose values are known.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.values: dict[Node, Tensor] = {}  # of the placeholders that are tensors of the module
        self.targets: dict[Node, str] = {}
        as_dynamo_writes(gm)
        lifted: dict[int, Node] = {}  # tied weights have several names and are one input
        for node in list(gm.graph.find_nodes(op="get_attr")):
            value = _attribute(gm, str(node.target))
            if not isinstance(value, Tensor):
                continue  # the body of a higher-order operator
            if id(value) not in lifted:
                lifted[id(value)] = self._placeholder(str(node.target), value)
                lifted[id(value)].meta = dict(node.meta)
            # Dynamo does not see that a weight is returned, and for its matmuls it does not matter.
            node.replace_all_uses_with(lifted[id(value)], delete_user_cb=lambda user: user.op != "output")
            if not node.users:
                gm.graph.erase_node(node)
        for node, value in self.values.items():
            if isinstance(value, nn.Parameter):
                mark_parameter(gm, node, value)

    def _placeholder(self, target: str, value: Tensor) -> Node:
        last = placeholders(self.gm)[-1:]
        graph = self.gm.graph
        with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("p_" + re.sub(r"\W", "_", target))
        self.values[node], self.targets[node] = value, target
        return node

    def inputs(self) -> list[Tensor | None]:
        """The values of the graph's inputs, None for those of the user."""
        return [self.values.get(node) for node in placeholders(self.gm)]

    def fold(self) -> int:
        """Fold the densified weights of a compact model, and compute once what depends on its factors alone.

        Returns the number of matmuls.
        """
        folded = fold_densify(self.gm, has_kernels)
        for node in list(self.gm.graph.nodes):
            if node.target is torch.ops.pixelfly.linear.default:
                for argument in node.args[1:5]:
                    self._compute(argument)
            elif node.target in DENSIFY:
                self._compute(node)  # something else than a matmul needs the dense weight
        return folded

    def _compute(self, node: object) -> None:
        if not isinstance(node, Node) or node.op == "placeholder":
            return
        with torch.no_grad():
            value = self._value_of(node)
        constant = self._placeholder(f"constant_{node.name}", value)
        constant.meta["example_value"] = value
        node.replace_all_uses_with(constant)
        erase_unused(node)

    def _value_of(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._value_of)
        function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        return function(*args, **kwargs)

    def rewrite(self, model: nn.Module, config: Config, asked: bool) -> Plan:
        """Plan, and put compact weights in place of the planned ones; the plan."""
        inputs, before = self.inputs(), placeholders(self.gm)
        names = parameter_names_by_identity(self.gm, inputs, model)
        settled = set() if asked else settled_weights(names, before, inputs)
        found = dense_if_settled(dense_without_kernels(find_sites(self.gm, inputs, names)), settled)
        found = with_aliases(found, aliases(model))
        positions = weight_positions(self.gm, names)
        weights = {name: self.values[before[position]] for name, position in positions.items()}
        announcer.unmatched(config, model, found)
        plan = make_plan(found, config, weights=weights)
        configs = sparse_configs(found, plan)
        if configs:
            sparse = {site.name: weights[site.parameter] for site in found.sites if site.name in configs}
            announcer.sparse(plan, found, sparse, whole=True)
            rewritten = rewrite(self.gm, found.matches, configs, positions, share_basis=plan.basis == "fixed")
            compact = CompactInputs(rewritten.added, CompactWeights(), plan.basis)
            with torch.no_grad():
                values = compact(tuple(inputs))
            new = placeholders(self.gm)[len(rewritten.kept) :]
            for node, key, value in zip(new, rewritten.added, values, strict=True):
                self.values[node], self.targets[node] = value, _compact_name(self.targets[before[key.weight]], key)
        for node in before:
            if node.name in names:
                self._project_others(node, names[node.name], plan, found, configs)
        return plan

    def _project_others(self, node: Node, name: str, plan: Plan, found: Found, compact: Collection[str]) -> None:
        """Give P(W) to what still takes a planned weight W: it is returned too, or its matmul is no site here."""
        weight, graph = self.values[node], self.gm.graph
        entries = [entry for entry in plan.sparse if name in (entry.parameter, *entry.aliases)]
        holders = [] if node._erased else [node]
        holders += [got for got in graph.find_nodes(op="get_attr") if _attribute(self.gm, got.target) is weight]
        users = {user for holder in holders for user in holder.users if not _looks_up(user)}
        if not entries or not users:
            return
        projected = weight.detach()
        for entry in entries:
            projected = project(projected, entry, plan.basis)
            if entry.name not in compact:
                log.warning(
                    "pixelfly: %s is sparse in the plan, but in the exported program a dense matrix, P(W): %s",
                    entry.name,
                    _why_dense(entry, found),
                )
        dense = self._placeholder(f"{self.targets[node]}_projected", projected)
        for holder in holders:
            holder.replace_all_uses_with(dense, delete_user_cb=users.__contains__)
            if holder.op == "get_attr":
                graph.erase_node(holder)

    def module(self) -> GraphModule:
        """The module again: its tensors are attributes, and only those that it uses."""
        attributes: dict[str, Any] = {
            str(node.target): _attribute(self.gm, str(node.target)) for node in self.gm.graph.find_nodes(op="get_attr")
        }
        graph = self.gm.graph
        first = next(iter(graph.nodes))
        for node in [node for node in placeholders(self.gm) if node in self.values]:
            target = self.targets[node]
            if node.users:
                attributes[target] = self.values[node]
                with graph.inserting_before(first):
                    node.replace_all_uses_with(graph.create_node("get_attr", target))
            graph.erase_node(node)
        as_export_runs(self.gm)
        return GraphModule(attributes, graph)


def _attribute(gm: GraphModule, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(gm.get_submodule(owner), name)


def _why_dense(entry: Entry, found: Found) -> str:
    reasons = {item.name: item.reason for item in found.skipped} | {site.name: site.reason for site in found.sites}
    return reasons.get(entry.name) or reasons.get(entry.parameter) or "its matmul is not in the exported graph"


def _looks_up(user: Node) -> bool:
    """An embedding takes rows of the weight as it is."""
    return user.op.startswith("call") and called(user) in ("embedding", "embedding_bag")


def _compact_name(weight: str, key: CompactInput) -> str:
    """h.0.fc.weight -> h.0.fc.weight_blocks; parts of one weight count from where they begin."""
    part = "" if key.region is None else f"_{key.region.offset}"
    return f"{weight}{part}_{key.part}"
