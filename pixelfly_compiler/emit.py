"""Emit GPU code on any machine: the code that `torch.compile(model, backend="pixelfly")` would run on the target.

    model, args --Dynamo, find sites, plan, rewrite, AOTAutograd--> graphs --Inductor, virtual device--> files, report

Everything up to AOTAutograd is the backend's own way, on the CPU; from there on `kernels.codegen_gpu` stands in for the
GPU. The plan is that of the target: its roofline, not this machine's. Attention is traced as matmuls and softmax.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from pixelfly_compiler.backend import (
    as_leaves,
    check_basis,
    dense_if_settled,
    inductor,
    own_copy,
    sparse_configs,
    weight_positions,
)
from pixelfly_compiler.capture import capture, run_once
from pixelfly_compiler.compact import CompactInputs, CompactWeights
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.emit_folder import KERNELS, REPORT, replaced_when_complete
from pixelfly_compiler.errors import EmitError, OptionError, PixelflyError
from pixelfly_compiler.kernels.gpus import KNOWN, Gpu
from pixelfly_compiler.names import weight_names
from pixelfly_compiler.passes.cost import gpu_device, sparse_time
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.fold_densify import fold_densify
from pixelfly_compiler.passes.open import open_composites
from pixelfly_compiler.passes.rewrite import rewrite
from pixelfly_compiler.passes.sites import Site
from pixelfly_compiler.passes.split import split_joined_weights
from pixelfly_compiler.passes.weights import own_name, parameter_names_by_identity
from pixelfly_compiler.plan import make_plan
from pixelfly_compiler.served import served_by_compact_models, served_by_the_rewrite, sites_of_nodes
from pixelfly_compiler.sparsify import compact_plan

log = logging.getLogger("pixelfly_compiler")


@dataclass(frozen=True)
class EmittedKernel:
    """One Triton kernel: whose it is, what it needs, where its files are.

    `sites`: the weights that a kernel of ours serves; none for those that Inductor made of the rest of the model.
    `spills`: bytes of spilled registers per thread. `seconds`: predicted for one call of ours, its product with v or u
    included; none for others, and for what `sparsify_` made compact: the plan that it followed may be for other rows.
    """

    name: str
    graph: str
    sites: tuple[str, ...]
    registers: int
    spills: int
    shared_memory: int
    tensor_core: dict[str, int] = field(hash=False)
    vector_loads: int
    warps: int
    stages: int
    seconds: float | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class Emission:
    """What `emit` wrote to `folder`: wrappers by graph, kernels, and the plan they follow."""

    target: str
    folder: Path
    plan: Plan
    wrappers: tuple[str, ...]
    kernels: tuple[EmittedKernel, ...]

    def __str__(self) -> str:
        from pixelfly_compiler.report import render_emission

        return render_emission(self)

    def to_json(self) -> str:
        return json.dumps(
            {
                "target": self.target,
                "wrappers": self.wrappers,
                "kernels": [asdict(kernel) for kernel in self.kernels],
                "plan": json.loads(self.plan.to_json()),
            },
            indent=1,
        )


def emit(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "cuda:90",
    out_dir: str | Path,
    training: bool = False,
    **options: Any,
) -> Emission:
    """Write the code of `model(*args, **kwargs)` for `target`: wrappers, kernels (source, machine code), report.json.

    The model and its inputs stay on the CPU. `training` adds the gradients; a forward that differentiates, as from
    energies to forces, has them anyway. `options` are those of `Config`: budget=0.25, block_size=, ... What an earlier
    emission wrote to `out_dir` is replaced when this one is complete. Raises `OptionError` for a target that is not
    known, `EmitError` without Triton, for what is not on the CPU, for a folder that cannot be used, and where Inductor
    or Triton fails.
    """
    gpu = _gpu(target)
    config, others = Config.from_options(options)
    if others:
        raise TypeError(f"emit() got an unexpected option {next(iter(others))!r}")
    positional = tuple(args) if isinstance(args, tuple | list) else (args,)
    model = getattr(model, "_orig_mod", model)
    _check(model, (positional, kwargs))
    folder = Path(out_dir)
    with replaced_when_complete(folder) as scratch:
        emission = _emit(model, positional, kwargs or {}, gpu, scratch, training, config, anew=bool(options))
    return replace(emission, folder=folder)


def _emit(
    model: nn.Module,
    positional: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gpu: Gpu,
    folder: Path,
    training: bool,
    config: Config,
    anew: bool,
) -> Emission:
    """The emission, written to an empty folder. `anew`: with options of its own."""
    weights = {own_name(name): parameter for name, parameter in model.named_parameters()}
    found = capture(model, positional, kwargs, training=training)
    compact = compact_plan(model)
    if compact and not anew:
        found = dense_if_settled(found, set(weights))
    plan = make_plan(
        found, config, weights=weights, device=gpu_device(gpu), training=training, names=weight_names(model, found)
    )
    gradients = training or found.differentiates
    with torch.set_grad_enabled(gradients):
        configs = sparse_configs(found, plan)
        check_basis(plan, [weights[site.parameter] for site in found.sites if site.name in configs])
    if compact:
        plan = _with_compact(plan, compact, anew)
    emitter = _Emitter(model, gpu, plan, folder, {site.name: site for site in found.sites})
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        try:
            run_once(model, positional, kwargs, emitter, grad=gradients)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            raise failure.inner_exception from failure.inner_exception.__cause__
    emission = Emission(gpu.target, folder, plan, tuple(emitter.wrappers), tuple(emitter.kernels))
    (folder / REPORT).write_text(emission.to_json())
    return emission


def _gpu(target: str) -> Gpu:
    if target not in KNOWN:
        raise OptionError(f"target {target!r} is not known", next_step=f"known targets: {', '.join(KNOWN)}")
    if importlib.util.find_spec("triton") is None:
        raise EmitError("Triton is not installed", next_step="pip install triton (Linux), then emit again")
    return KNOWN[target]


def _check(model: Any, inputs: Any) -> None:
    """The model is a module, and all that it computes with is on the CPU."""
    if not isinstance(model, nn.Module):
        raise EmitError(
            f"the model is a {type(model).__name__}", next_step="give an nn.Module whose weights are to be sparse"
        )
    arguments = [("an argument", value) for value in tree_leaves(inputs) if isinstance(value, Tensor)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *arguments):
        if tensor.device.type != "cpu":
            raise EmitError(
                f"{name} is on {str(tensor.device)!r}",
                next_step="the model is traced on the CPU, whatever the target: bring it and its arguments there",
            )


def _with_compact(plan: Plan, compact: Plan, anew: bool) -> Plan:
    """The plan that a compact model was made with, then what was found in it now. `anew`: with options of its own."""
    entries = (*compact.sparse, *plan.entries)
    if anew:
        return replace(plan, entries=entries, notes=(*compact.notes, *plan.notes))
    return replace(compact, entries=entries, training=plan.training)


class _Emitter:
    """The backend that writes code instead of running it; the model itself runs eagerly."""

    def __init__(self, model: nn.Module, gpu: Gpu, plan: Plan, folder: Path, sites: Mapping[str, Site]) -> None:
        self.model, self.gpu, self.plan, self.folder, self.sites = model, gpu, plan, folder, sites
        self.wrappers: list[str] = []
        self.kernels: list[EmittedKernel] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with self._named("a graph"):
            self._compile(gm, example_inputs)
        return gm.forward

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        graph = split_joined_weights(open_composites(own_copy(gm)))
        fold_densify(graph, lambda device: True)
        names = parameter_names_by_identity(graph, example_inputs, self.model)
        found = find_sites(graph, example_inputs, names)
        positions = weight_positions(graph, names)
        configs = sparse_configs(found, self.plan)
        inputs, served, kept = list(example_inputs), {}, tuple(range(len(example_inputs)))
        if configs:
            rewritten = rewrite(graph, found.matches, configs, positions, share_basis=self.plan.basis == "fixed")
            compact = CompactInputs(rewritten.added, CompactWeights(), self.plan.basis)
            kept = rewritten.kept
            inputs = [example_inputs[position] for position in kept]
            served = served_by_the_rewrite(
                rewritten.added, len(inputs), [(positions[site.parameter], site) for site in found.sites]
            )
            inputs += as_leaves(compact.examples(tuple(example_inputs)))
        served |= served_by_compact_models(positions, kept)
        with torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
            inductor(graph, inputs, {}, inner_compile=_Writer(self, served))

    def write(self, gm: GraphModule, example_inputs: Sequence[Any], sites: Mapping[Node, str], **kwargs: Any) -> None:
        """Code, files and facts of one graph as AOTAutograd hands it over. `sites` of its nodes."""
        from pixelfly_compiler.kernels.codegen_gpu import generate

        label = f"{'backward' if kwargs.get('is_backward') else 'forward'}_{len(self.wrappers)}"
        with self._named(label):
            code = generate(gm, example_inputs, self.gpu, **kwargs)
        log.info("pixelfly: compiling %d kernels of %s for %s", len(code.kernels), label, self.gpu.target)
        wrapper = self.folder / f"{label}.py"
        wrapper.write_text(code.wrapper)
        self.wrappers.append(wrapper.name)
        for name, source in code.kernels.items():
            serves = tuple(dict.fromkeys(sites[node] for node in code.nodes.get(name, ()) if node in sites))
            self.kernels.append(self._kernel(name, source, label, serves))

    def _kernel(self, name: str, source: str, label: str, sites: tuple[str, ...]) -> EmittedKernel:
        from pixelfly_compiler.kernels.triton_binary import compile_kernel

        path = self.folder / KERNELS / f"{label}_{name}.py"
        path.write_text(source)
        with self._named(" of ".join([f"the kernel {name}", *sites[:1]])):
            binary = compile_kernel(name, path, self.gpu)
        files = [path]
        for ending, content in binary.code.items():
            files.append(path.with_suffix(f".{ending}"))
            files[-1].write_bytes(content.encode() if isinstance(content, str) else content)
        return EmittedKernel(
            name=name,
            graph=label,
            sites=sites,
            registers=binary.registers,
            spills=binary.spills,
            shared_memory=binary.shared_memory,
            tensor_core=binary.tensor_core,
            vector_loads=binary.vector_loads,
            warps=binary.warps,
            stages=binary.stages,
            seconds=self._seconds(sites),
            files=tuple(str(file.relative_to(self.folder)) for file in files),
        )

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Tell of what an error of Inductor or Triton is. Ours tell it; after some Dynamo goes on in another way."""
        from torch._dynamo import exc

        try:
            yield
        except (PixelflyError, exc.RestartAnalysis, exc.SkipFrame, *exc.exceptions_allowed_to_be_fallback):
            raise
        except Exception as cause:
            raise EmitError(
                f"{what} cannot be compiled for {self.gpu.target}: {type(cause).__name__}: {str(cause)[:2000]}",
                next_step="exclude its weights (exclude=[...]), or report it with the traceback of the cause",
            ) from cause

    def _seconds(self, sites: tuple[str, ...]) -> float | None:
        entry = self.plan.find(sites[0]) if sites else None
        if entry is None or entry.config is None or entry.name not in self.sites:
            return None
        return sparse_time(self.sites[entry.name], entry.config, gpu_device(self.gpu))


@dataclass(frozen=True)
class _Writer:
    """The `inner_compile` of one Dynamo graph. `saved`: what the forward tells the backward of its nodes' sites."""

    emitter: _Emitter
    served: Mapping[int, str]
    saved: dict[str, str] = field(default_factory=dict)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        self.emitter.write(gm, example_inputs, sites_of_nodes(gm, self.served, self.saved), **kwargs)
        return gm.forward
