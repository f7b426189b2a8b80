"""The backend: `torch.compile(model, backend="pixelfly")`. The whole way on one page.

gm, inputs --find sites--> --plan--> --rewrite--> compile_fx with our lowerings --> code that takes compact weights

The weights of a compact model (`sparsify_`) are folded into their matmuls before; what `sparsify_` left dense stays so,
unless an option of ours is given.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._logging._internal import trace_structured
from torch.fx import GraphModule, Node

from pixelfly_compiler.attached import Attached
from pixelfly_compiler.compact import CompactInputs, CompactWeights
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.errors import OptionError, raised_as_they_are
from pixelfly_compiler.kernels.cpus import has_matrix_unit
from pixelfly_compiler.kernels.gpus import why_no_kernels
from pixelfly_compiler.names import Origin, dense_if_shared, names_of, namesakes, origin_of
from pixelfly_compiler.passes.attention import replace_attention
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.fold_densify import fold_densify
from pixelfly_compiler.passes.open import open_composites
from pixelfly_compiler.passes.reasons import BOTH_ORIENTATIONS, overlapping
from pixelfly_compiler.passes.regions import overlap
from pixelfly_compiler.passes.rewrite import Rewritten, rewrite
from pixelfly_compiler.passes.sites import Found, Site, SiteConfig
from pixelfly_compiler.passes.split import split_joined_weights
from pixelfly_compiler.passes.weights import own_name, placeholders
from pixelfly_compiler.plan import make_plan
from pixelfly_compiler.report import announcer
from pixelfly_compiler.sparsify import dense_parameters_of_compact_models

log = logging.getLogger("pixelfly_compiler")

_weights = CompactWeights()
# What was decided for each weight, by configuration: training and evaluation, or two batch sizes, must mean the same.
_decided = Attached[str, Entry]()
# Why a weight is no site in a piece of a model that uses it, by configuration and model, and that model: it then stays
# dense in the other pieces too.
_used_densely = Attached[str, tuple[weakref.ref[torch.nn.Module], str]]()


@raised_as_they_are
def pixelfly(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its planned matmuls made sparse. `options`: those of `Config`, and Inductor's own."""
    from torch._dynamo.eval_frame import innermost_fn  # heavy to import, and only needed here

    config, inductor_options = Config.from_options(options)
    patches = _inductor_patches(mode, inductor_options)
    origin = origin_of(gm)
    gm = split_joined_weights(open_composites(own_copy(gm)))
    replace_attention(gm)
    folded = fold_densify(gm, has_kernels)
    names = names_of(gm, example_inputs, origin)
    found = dense_without_kernels(find_sites(gm, example_inputs, names))
    found = dense_if_shared(found, gm, example_inputs, origin, config)
    if origin.root is not None:
        announcer.unmatched(config, origin.root, found, logging.INFO)  # one set of options may be for many layers
    asked = len(inductor_options) < len(options or {})
    settled = set() if asked else settled_weights(names, placeholders(gm), example_inputs)
    found = dense_if_settled(found, settled)
    weights = weight_positions(gm, names)
    values = {name: example_inputs[position] for name, position in weights.items()}
    found = _dense_as_before(found, config, values, (gm, example_inputs), origin)
    plan = _plan(found, config, values, origin)
    configs = sparse_configs(found, plan)
    if not configs and (folded or settled):
        return inductor(gm, example_inputs, patches)
    if not configs:
        return announcer.watch(inductor(gm, example_inputs, patches), plan, origin.whole)
    planned = {site.name: example_inputs[weights[site.parameter]] for site in found.sites if site.name in configs}
    check_basis(plan, list(planned.values()))
    rewritten = rewrite(gm, found.matches, configs, weights, share_basis=plan.basis == "fixed")
    compact = CompactInputs(rewritten.added, _weights, plan.basis)
    _mark_lasting(gm, rewritten, training=any(weight.requires_grad for weight in planned.values()))
    _trace(plan)
    announcer.sparse(plan, found, planned, origin.whole)
    compact.prepare(tuple(example_inputs))
    examples = compact.examples(tuple(example_inputs))
    inputs = [*(example_inputs[position] for position in rewritten.kept), *as_leaves(examples)]
    compiled = innermost_fn(inductor(gm, inputs, patches))  # Dynamo disables itself for `run`: once is enough

    def run(*args: Any) -> Any:
        return compiled(*[args[position] for position in rewritten.kept], *compact(args))

    return run


def _reset() -> None:
    """Called by `torch._dynamo.reset()`: forget every compact weight and every decision."""
    _weights.clear()
    _decided.clear()
    _used_densely.clear()
    announcer.clear()


pixelfly.reset = _reset  # type: ignore[attr-defined]


def own_copy(gm: GraphModule) -> GraphModule:
    """A copy of the graph to rewrite: Dynamo still reads its own graph after the backend returns."""
    own = _copy_of_graph(gm)
    if hasattr(gm, "_param_name_to_source"):
        own._param_name_to_source = gm._param_name_to_source
    for node, original in zip(placeholders(own), placeholders(gm), strict=True):
        node._dynamo_source = getattr(original, "_dynamo_source", None)
        node.meta.pop("grapharg", None)  # a weak reference to the input, which Dynamo drops from its own graph
    return own


def _copy_of_graph(gm: GraphModule) -> GraphModule:
    """A new graph over the same tensors and submodules. The branches and loops inside of it are new graphs too."""
    own = GraphModule(gm, copy.deepcopy(gm.graph))
    own.meta = dict(gm.meta)
    for name, inner in own.named_children():
        if isinstance(inner, GraphModule):
            setattr(own, name, _copy_of_graph(inner))
    return own


def as_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The compact inputs as AOTAutograd is to see them: leaves of static shape, also where Dynamo's are dynamic."""
    context = torch._guards.TracingContext.try_get()
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    if context is None or context.fake_mode is None:
        return leaves
    return [context.fake_mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]


def weight_positions(gm: GraphModule, names: Mapping[str, str]) -> dict[str, int]:
    """Parameter name -> position among the graph's inputs."""
    return {names[node.name]: position for position, node in enumerate(placeholders(gm)) if node.name in names}


def _mark_lasting(gm: GraphModule, rewritten: Rewritten, training: bool) -> None:
    """Tell CUDA graphs which compact inputs stay where they are from call to call, so that they are not copied: those
    that are made once, and without training all of them. It is how Dynamo marks the parameters.
    """
    made_again = ("blocks", "u") if training and torch.is_grad_enabled() else ()
    for node, added in zip(placeholders(gm)[len(rewritten.kept) :], rewritten.added, strict=True):
        if added.part not in made_again:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def has_kernels(device: torch.device) -> bool:
    """Have we kernels for this device?"""
    return why_no_kernels(device) is None


def settled_weights(names: Mapping[str, str], nodes: Sequence[Node], example_inputs: Sequence[Any]) -> set[str]:
    """The names of those weights whose model was made compact: they are what `sparsify_` left dense."""
    settled = dense_parameters_of_compact_models()
    values = {node.name: value for node, value in zip(nodes, example_inputs, strict=False)}
    return {name for node, name in names.items() if id(values[node]) in settled}


def dense_if_settled(found: Found, settled: set[str]) -> Found:
    """What `sparsify_` left dense stays dense."""
    reason = "sparsify_ left it dense; an option (options={'budget': ...}) makes it sparse here"
    sites = tuple(
        replace(site, reason=reason) if site.reason is None and site.parameter in settled else site
        for site in found.sites
    )
    return replace(found, sites=sites)


def dense_without_kernels(found: Found) -> Found:
    """Sites on devices that we have no kernels for stay dense, also with `force`: the references are slow."""
    sites = tuple(
        replace(site, reason=why_no_kernels(torch.device(site.device))) if site.reason is None else site
        for site in found.sites
    )
    return replace(found, sites=sites)


def _dense_as_before(
    found: Found,
    config: Config,
    weights: Mapping[str, Tensor],
    graph: tuple[GraphModule, Sequence[Any]],
    origin: Origin,
) -> Found:
    """What an earlier piece of the same model uses in a way that keeps it dense stays dense, as `plan()` has it; and
    this piece's such uses are remembered, for all weights that its code serves. What is sparse already stays so, with a
    warning: see `_plan`. Graphs that are whole are other calls, each with a plan of its own.
    """
    if config.plan is not None or origin.root is None or origin.whole:
        return found
    model, key = f"{id(origin.root)} {config!r}", repr(config)
    why: dict[str, str] = {}
    for site in found.sites:
        weight = weights[site.parameter]
        root, before = _used_densely.of(weight).get(model, (None, ""))
        same = root is not None and root() is origin.root  # a new model may have the id of one that is gone
        if same and site.reason is None and key + _matrix(site) not in _decided.of(weight):
            why[site.name] = f"in another graph: {before}"
    reasons = {item.name: item.reason for item in found.skipped if item.used and not item.lookup}
    served = namesakes([graph], origin.root) if reasons else {}
    own = {own_name(name): weight for name, weight in origin.root.named_parameters(remove_duplicate=False)}
    for name in reasons.keys() & weights.keys():
        for weight in (weights[name], *(own[other] for other in served.get(name, ()))):
            _used_densely.of(weight)[model] = weakref.ref(origin.root), reasons[name]
    announcer.stay_dense(why)
    return replace(found, sites=tuple(replace(s, reason=why.get(s.name, s.reason)) for s in found.sites))


def _plan(found: Found, config: Config, weights: Mapping[str, Tensor], origin: Origin) -> Plan:
    """The plan for this graph, true to what was decided for its weights in earlier graphs."""
    key = repr(config)
    known: dict[str, Entry] = {}
    for site in found.sites:
        entry = _decided.of(weights[site.parameter]).get(key + _matrix(site))
        if entry is not None:
            known[site.name] = entry
    training = torch.is_grad_enabled() and (origin.root is None or origin.root.training)
    training = training and any(site.trained for site in found.sites)
    plan = make_plan(found, config, weights=weights, training=training, decided=known)
    _warn_of_other_uses(found, sparse_configs(found, plan), config, weights, origin)
    if config.plan is None:
        for site in found.sites:
            _decided.of(weights[site.parameter])[key + _matrix(site)] = plan[site.name]
    return plan


def _matrix(site: Site | Entry) -> str:
    """Which part of its weight it is, and how that lies there."""
    return repr((site.region, site.transposed))


def _warn_of_other_uses(
    found: Found,
    configs: Collection[str],
    config: Config,
    weights: Mapping[str, Tensor],
    origin: Origin,
) -> None:
    """Warn of weights that are sparse in the plan, or in an earlier graph, and here dense or cut otherwise; where the
    graph is not known to be a piece of a model, only of those that it multiplies with.
    """
    key = repr(config)

    def sparse(name: str) -> list[Entry]:
        if config.plan is not None:
            return [entry for entry in config.plan.of_parameter(name) if entry.config]
        return [entry for part, entry in _decided.of(weights[name]).items() if part.startswith(key) and entry.config]

    where = "an earlier graph" if config.plan is None else "the plan"
    for site in found.sites:
        for entry in sparse(site.parameter):
            same = _matrix(entry) == _matrix(site)
            if (not same or site.name not in configs) and overlap(entry.box, site.box):
                turned = BOTH_ORIENTATIONS if entry.region == site.region else overlapping(site.name, entry.name)
                announcer.used_otherwise(site.parameter, where, site.reason or ("densely" if same else turned))
    is_piece = origin.root is not None and not origin.whole
    for item in found.skipped:
        otherwise = item.flops or (is_piece and item.used and not item.lookup)
        if otherwise and item.name in weights and sparse(item.name):
            announcer.used_otherwise(item.name, where, item.reason)


def sparse_configs(found: Found, plan: Plan) -> dict[str, SiteConfig]:
    """Site name -> config, for the sites of this graph that the plan makes sparse."""
    configs: dict[str, SiteConfig] = {}
    for site in found.sites:
        entry = plan.find(site.name, site.weight_shape)
        if entry is not None and entry.config is not None and site.reason is None:
            configs[site.name] = entry.config
    return configs


def check_basis(plan: Plan, weights: Sequence[Tensor]) -> None:
    if plan.basis == "svd" and torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise OptionError(
            "basis 'svd' depends on the weights and has no gradient, but this model is being trained",
            next_step="use basis='fixed' to train, or run under torch.no_grad() or torch.inference_mode()",
        )


def _inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    return {**(list_mode_options(mode) if mode else {}), **options}


def inductor(
    gm: GraphModule,
    inputs: Sequence[Any],
    patches: Mapping[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Inductor with our lowerings. `inner_compile` makes code of a single graph, forward or backward."""
    from torch._inductor.compile_fx import compile_fx

    from pixelfly_compiler.kernels import lowering

    lowering.register()
    with cache_tag():
        compiled: Any = compile_fx(
            gm, list(inputs), inner_compile=inner_compile or _inner_compile, config_patches=dict(patches)
        )
    return compiled


def _inner_compile(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Code for one graph, forward or backward. If a kernel fails to compile, the operators' references run instead.

    Inductor comes here also when it compiles a backward late, at the first `backward()`.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    if not any(getattr(node.target, "namespace", None) == "pixelfly" for node in gm.graph.nodes):
        return compile_fx_inner(gm, example_inputs, **kwargs)
    untouched = _copy_of_graph(gm)
    try:
        with cache_tag():
            return compile_fx_inner(gm, example_inputs, **kwargs)
    except (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame):
        raise  # Dynamo's way to ask for another attempt
    except Exception as cause:
        code = _with_references(untouched, example_inputs, kwargs)
        which = "backward" if kwargs.get("is_backward") else "forward"
        log.warning(
            "pixelfly: a kernel of the %s graph could not be compiled, so that the slow reference runs: results are "
            "right, speed is not. Please report it. Cause: %s: %s",
            which,
            type(cause).__name__,
            str(cause)[:2000],
        )
        return code


def _with_references(gm: GraphModule, example_inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Uncached: the next process is to try the kernels again."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    from pixelfly_compiler.kernels import lowering

    with lowering.references_only(), config.patch(fx_graph_cache=False, fx_graph_remote_cache=False):
        return compile_fx_inner(gm, example_inputs, **kwargs)


def cache_tag() -> AbstractContextManager[Any]:
    """Compiler caches must tell apart what two versions of this package generate, and for CPUs with a matrix unit."""
    import torch.compiler.config as compiler_config

    unit = "-unit" if has_matrix_unit() else ""
    tag = f"{compiler_config.cache_key_tag}pixelfly-{_source_hash()}{unit}"
    return compiler_config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("kernels/**/*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _trace(plan: Plan) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "pixelfly_plan", "encoding": "json"},
        payload_fn=plan.to_json,
    )
