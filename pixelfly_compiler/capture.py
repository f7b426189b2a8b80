"""Run a model once under Dynamo and collect the sites of all its graphs; nothing is compiled, nothing is changed."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixelfly_compiler.errors import PlanError
from pixelfly_compiler.names import namesakes
from pixelfly_compiler.passes.find import find_sites
from pixelfly_compiler.passes.open import open_composites
from pixelfly_compiler.passes.reasons import BOTH_ORIENTATIONS, overlapping
from pixelfly_compiler.passes.regions import overlap
from pixelfly_compiler.passes.sites import Found, Site, Skipped
from pixelfly_compiler.passes.split import split_joined_weights
from pixelfly_compiler.passes.weights import own_name, parameter_names_by_identity, storages

Record = tuple[GraphModule, tuple[Any, ...]]
_records: ContextVar[list[Record] | None] = ContextVar("pixelfly_records", default=None)


def _recording_backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles nothing and records each *run*, so that a graph that serves two layers counts twice."""
    split_joined_weights(open_composites(gm))

    def run(*inputs: Any) -> Any:
        records = _records.get()
        if records is not None:
            records.append((gm, inputs))
        with _ParametersRestored(inputs):
            return gm.forward(*inputs)

    return run


class _ParametersRestored(TorchDispatchMode):
    """What a graph writes to its parameters is undone behind it. Only those are copied, and when that is due."""

    supports_higher_order_operators = True

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(operator, OpOverload) and operator._schema.is_mutable:
            written = storages((args, kwargs))
            for parameter in self.parameters:
                if storages(parameter) & written and id(parameter) not in self.before:
                    self.before[id(parameter)] = parameter, parameter.detach().clone()
        return operator(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for parameter, value in self.before.values():
                parameter.copy_(value)


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, training: bool = False
) -> Found:
    """The sites of `model(*args, **kwargs)` in all graphs that Dynamo makes of it, by the model's parameter names.

    `training`: with gradients on, as custom autograd functions stay whole only then.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError("the model is TorchScript, which Dynamo does not look into", next_step="give the nn.Module")
    with _gradients_asked_for() as asked:
        records, grad = _recorded(model, args, kwargs, training)
    found = [find_sites(gm, inputs, parameter_names_by_identity(gm, inputs, model)) for gm, inputs in records]
    named = with_aliases(merge(found), aliases(model))
    named = _with_namesakes(named, namesakes(records, model))
    listed = _with_the_unseen(_with_unseen_lookups(named, model), model)
    return replace(listed, differentiates=grad and not training, second_derivatives=any(asked))


@contextmanager
def _gradients_asked_for() -> Iterator[list[bool]]:
    """Of each time that the forward asks for gradients: if these can be differentiated again."""
    asked: list[bool] = []
    original: Any = vars(torch.autograd).get("_engine_run_backward")  # private; `grad` and `backward` both end there
    if original is None:
        yield asked
        return

    @torch.compiler.disable
    def run(outputs: Any, gradients: Any, retain: Any, create_graph: bool, *args: Any, **kwargs: Any) -> Any:
        in_func = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func always says `create_graph`
        asked.append(create_graph and not in_func)
        return original(outputs, gradients, retain, create_graph, *args, **kwargs)

    with patch.object(torch.autograd, "_engine_run_backward", run):
        yield asked


def _recorded(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, grad: bool
) -> tuple[list[Record], bool]:
    """Every run of a graph, and if gradients were on: a forward that differentiates, as from energies to forces, gets
    the caller's.
    """
    records: list[Record] = []
    token = _records.set(records)
    try:
        run_once(model, args, kwargs, _recording_backend, grad=grad)
        return records, grad
    except Exception:  # whatever the model raises where it needs gradients; anything else it raises again
        if grad or not torch.is_grad_enabled():
            raise
    finally:
        _records.reset(token)
    return _recorded(model, args, kwargs, grad=True)


def run_once(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    backend: Callable[..., Any],
    *,
    grad: bool = False,
) -> None:
    """Run the model once with its graphs handed to `backend`; model, inputs and random state stay as they were."""
    without_gradients = not grad or any(parameter.is_inference() for parameter in model.parameters())
    inference = torch.inference_mode(torch.is_inference_mode_enabled() and without_gradients)
    with inference, _unchanged(model, (args, kwargs)), torch.set_grad_enabled(grad), warnings.catch_warnings():
        # Dynamo looks at the `.grad` of what comes from the graph before.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        torch.compile(model, backend=backend, **_apart())(*args, **(kwargs or {}))


def _apart() -> dict[str, Any]:
    """From torch 2.13 on, what is compiled here need not count towards the recompilations the user's code may have."""
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if known else {}


@contextmanager
def _unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Restore what a forward changes: buffers, inputs and random states. Dynamo forgets the shapes it has seen here."""
    held: list[tuple[dict[str, Any], dict[str, Any]]]
    held = [(kept, dict(kept)) for module in model.modules() for kept in (module._buffers, module._parameters)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor) and not value.is_inference()]
    given = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    settings = {
        "recompile_limit": 1_000_000,
        "accumulated_recompile_limit": 1_000_000,
        # A graph for each size that comes by: code for any size would know the flops of one of them.
        "automatic_dynamic_shapes": False,
    }
    patched = torch._dynamo.config.patch(settings)
    with torch.random.fork_rng(devices=devices), _same_numbers(), patched, _forgotten_shapes():
        try:
            yield
        finally:
            for kept, before in held:
                kept.update(before)
            written = [(tensor, value) for tensor, version, value in given if tensor._version != version]
            with torch.no_grad():
                for tensor, value in buffers + written:
                    tensor.copy_(value)


@contextmanager
def _same_numbers() -> Iterator[None]:
    """Restore the random states of Python and NumPy: models draw from them too, as masks and layers to drop."""
    before, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)


@contextmanager
def _forgotten_shapes() -> Iterator[None]:
    """Dynamo makes a size dynamic when it sees a second value of it; the sizes of this run must not be the first."""
    try:
        from torch._dynamo.pgo import get_code_state

        state = get_code_state()
        before = copy.deepcopy(dict(state))
    except (ImportError, AttributeError, AssertionError):  # private; without it a later compile may be dynamic too soon
        yield
        return
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each parameter -> its other names (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(own_name(name))
    return {first: tuple(others) for first, *others in names.values()}


def merge(found: Sequence[Found]) -> Found:
    """One `Found` of several graphs of a model: a weight that several use is one site."""
    sites: dict[str, Site] = {}
    skipped: dict[str, Skipped] = {}
    for one in found:
        for site in one.sites:
            sites[site.name] = _merge_sites(sites[site.name], site) if site.name in sites else site
        for item in one.skipped:
            if item.name in skipped:
                item = _merge_skipped(skipped[item.name], item)
            skipped[item.name] = item
    parts: dict[str, list[Site]] = {}
    for site in sites.values():
        parts.setdefault(site.parameter, []).append(site)
    for name, of_one in parts.items():
        elsewhere = skipped.pop(name, None)
        sites |= {site.name: _with_other_uses(_dense_if_overlapped(site, of_one), elsewhere) for site in of_one}
        if elsewhere is not None:
            first = sites[of_one[0].name]
            sites[first.name] = replace(first, other_flops=first.other_flops + elsewhere.flops)
    matches = tuple(match for one in found for match in one.matches)
    return Found(tuple(sites.values()), matches, tuple(skipped.values()))


def _why_unseen(model: nn.Module, name: str) -> str:
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.RNNBase):
        return "in no graph: Dynamo runs nn.LSTM, nn.GRU and nn.RNN outside of compiled code, but not loops over cells"
    reason = "in no graph: not used, or run outside of compiled code, as TORCH_LOGS=graph_breaks tells"
    if "expert" in name:
        reason += ". A loop over experts is: in transformers choose model.set_experts_implementation('grouped_mm')"
    return reason


def _with_the_unseen(found: Found, model: nn.Module) -> Found:
    """Parameters that no graph has are listed too."""
    listed = [(site.parameter, *site.aliases) for site in found.sites]
    listed += [(item.name, *item.aliases) for item in found.skipped]
    known = {name for names in listed for name in names}
    unseen = tuple(
        Skipped(own_name(name), tuple(weight.shape), _why_unseen(model, name), used=False)
        for name, weight in model.named_parameters()
        if own_name(name) not in known and not is_lazy(weight) and weight.dim() >= 2
    )
    return replace(found, skipped=found.skipped + unseen)


def _with_unseen_lookups(found: Found, model: nn.Module) -> Found:
    """A weight that an embedding holds too may be looked up outside of compiled code."""
    tables = {
        f"{own_name(f'{path}.')}weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    sites = tuple(
        replace(site, shared=True) if 0 < len(tables & {site.parameter, *site.aliases}) <= len(site.aliases) else site
        for site in found.sites
    )
    return replace(found, sites=sites)


def _with_other_uses(site: Site, item: Skipped | None) -> Site:
    """`item`: how a graph without matmuls with the weight uses it."""
    if item is not None and item.lookup:
        return replace(site, shared=True)
    if item is not None and item.used and site.reason is None:
        return replace(site, reason=f"in another graph: {item.reason}")
    return site


def _dense_if_overlapped(site: Site, parts: Sequence[Site]) -> Site:
    other = next((part for part in parts if part is not site and overlap(part.box, site.box)), None)
    if other is None or site.reason is not None:
        return site
    return replace(site, reason=overlapping(site.name, other.name))


def _merge_skipped(a: Skipped, b: Skipped) -> Skipped:
    """Elsewhere unused or a lookup says less than any other reason."""
    return replace(b if a.lookup or not a.used else a, flops=a.flops + b.flops)


def _merge_sites(a: Site, b: Site) -> Site:
    reason = a.reason or b.reason
    if reason is None and a.transposed != b.transposed:
        reason = BOTH_ORIENTATIONS
    if reason is None and a.region != b.region:
        reason = overlapping(a.name, b.name)
    if a.region != b.region:  # rows of other lengths
        b = replace(b, rows=0, rows_expr="0", other_flops=b.other_flops + 2 * b.rows * b.elements)
    rows_expr = a.rows_expr if b.rows_expr == "0" else f"{a.rows_expr} + {b.rows_expr}"
    return replace(
        a,
        rows=a.rows + b.rows,
        rows_expr=str(a.rows + b.rows) if rows_expr.replace(" + ", "").isdigit() else rows_expr,
        uses=a.uses + b.uses,
        shared=a.shared or b.shared,
        other_flops=a.other_flops + b.other_flops,
        modules=tuple(dict.fromkeys(a.modules + b.modules)),
        reason=reason,
    )


def _with_namesakes(found: Found, places: Mapping[str, tuple[str, ...]]) -> Found:
    """`places`: parameter name -> the weights that its code may run with, by any of their names."""
    first_names = {name: site.parameter for site in found.sites for name in (site.parameter, *site.aliases)}

    def others(site: Site) -> tuple[str, ...]:
        names = dict.fromkeys(first_names[name] for name in places.get(site.parameter, ()) if name in first_names)
        return tuple(name + site.label for name in names if name != site.parameter)

    return replace(found, sites=tuple(replace(site, namesakes=others(site)) for site in found.sites))


def with_aliases(found: Found, names: Mapping[str, tuple[str, ...]]) -> Found:
    """What was found, with the other names of tied weights."""
    sites = tuple(replace(site, aliases=names.get(site.parameter, ())) for site in found.sites)
    skipped = tuple(replace(item, aliases=names.get(item.name, ())) for item in found.skipped)
    return replace(found, sites=sites, skipped=skipped)
