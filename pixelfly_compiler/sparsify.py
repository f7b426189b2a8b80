"""Compact models: the weights of the planned sites become their factors, and only these exist and are trained.

    sparsify_(model, args, budget=0.25)    every planned weight becomes blocks, u, v and gamma (`CompactWeight`)
    densify_(model)                        and dense again
    load_weights_(model, state_dict)       dense or compact weights, into a model of either kind

The model runs in eager mode as it is; `torch.compile(model, backend="pixelfly")` never makes the dense weight.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pixelfly_compiler.capture import capture
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import REPLAN, Entry, Plan
from pixelfly_compiler.errors import CompactError, OptionError, PlanMismatchError
from pixelfly_compiler.kernels import projection
from pixelfly_compiler.names import weight_names
from pixelfly_compiler.owners import Owner, check_shape, heads, owners, planned
from pixelfly_compiler.parametrization import OPTIMIZERS, CompactWeight, Factors
from pixelfly_compiler.passes.regions import Region
from pixelfly_compiler.passes.sites import Site
from pixelfly_compiler.passes.weights import own_name
from pixelfly_compiler.plan import make_plan
from pixelfly_compiler.report import announcer

log = logging.getLogger("pixelfly_compiler")

INITS = ("scratch", "project")
_PLAN = "_pixelfly_plan"  # attribute of the module that was made compact

_EXTRA_STATE = "0._extra_state"  # the parametrization's, after the prefix of the weight

T = TypeVar("T")


def sparsify_(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    init: str = "scratch",
    optimizer: str = "adam",
    untie: bool = False,
    **options: Any,
) -> nn.Module:
    """Make `model` compact, in place: the planned weights become W = gamma B + (1 - gamma) U V^T. Returns the model.

    args, kwargs  an example of what the model is called with; `args` is a tuple, or one tensor. Not needed with `plan`.
    init          "scratch": new random factors with the variance of the weights, to train from scratch;
                  "project": the best approximation of the weights, to fine-tune a trained model
    optimizer     "adam": built for Adam, AdamW, Adafactor, Lion, ...; "sgd": for SGD. See `parametrization.py`
    untie         a head whose weight is also an embedding's table gets compact weights of its own, and the table stays
                  as it is; else both stay one dense weight. `densify_` does not tie them again
    options       those of `plan()`: budget=0.25, plan=, block_size=, include=, exclude=, ...; `vary_strides` is true
                  unless it is given

    Build the optimizer, and wrap in DDP or FSDP, afterwards. All or nothing: after an error the model is what it was.
    """
    model = getattr(model, "_orig_mod", model)
    _check_choice("init", init, INITS)
    _check_choice("optimizer", optimizer, OPTIMIZERS)
    if "basis" in options:
        raise OptionError("sparsify_ has no option 'basis'", next_step="leave it out: u and v are both learned")
    varied = {} if options.get("plan") is not None else {"vary_strides": True}
    config, others = Config.from_options(varied | options)
    if others:
        raise TypeError(f"sparsify_() got an unexpected option {next(iter(others))!r}")
    _check_model(model)
    plan = config.plan or _plan(model, args, kwargs, config, untie)
    targets = _targets(model, plan, optimizer, untie)
    _check_optimizers([target.weight for target in targets])
    with _all_or_nothing(targets):
        _register(targets, init)
        setattr(model, _PLAN, plan)
    _say(plan, targets, init)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Give a compact model dense parameters again, with the values that its weights have, in place. Returns the model.

    They are in the order they had before `sparsify_`. An optimizer has to be built anew.
    """
    model = getattr(model, "_orig_mod", model)
    held = list(compact_weights(model))
    if not held:
        raise CompactError("the model has no compact weight", next_step="densify_ undoes sparsify_")
    for weight in held:
        with torch.no_grad():
            dense = weight.value().contiguous()
        trainable = any(part.requires_grad for part in weight.factors().values())
        order = weight.parametrization.order
        _unregister(weight.module, weight.attribute)
        weight.module.register_parameter(weight.attribute, nn.Parameter(dense, trainable))
        _order(weight.module, order)
    for module in model.modules():
        vars(module).pop(_PLAN, None)
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model was made compact with, also through wrappers (torch.compile, DDP, AveragedModel)."""
    plan = compact_plan(model)
    if plan is None:
        raise CompactError("the model is not compact", next_step="sparsify_(model, args) makes it so")
    return plan


def compact_plan(model: nn.Module) -> Plan | None:
    """The same, None for a model that is not compact."""
    return next((vars(module)[_PLAN] for module in model.modules() if _PLAN in vars(module)), None)


def factors(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Name of each compact weight -> its stored factors by name: blocks, u, v and gamma (blocks alone at rank 0).

    For choosing what to train: `for parts in factors(model).values(): parts["blocks"].requires_grad_(False)`.
    """
    return {weight.name: weight.factors() for weight in compact_weights(model)}


def load_weights_(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> nn.Module:
    """Load dense or compact weights into a model of either kind, in place. Returns the model.

    dense into compact      each compact weight becomes the best approximation, as with `init="project"`
    compact into dense      the model is made compact first, just as the one that was saved
    alike                   as `model.load_state_dict(state_dict)`, which may be called instead

    A tied weight may be there under one of its names only, as in safetensors. `strict` is `load_state_dict`'s.
    """
    model = getattr(model, "_orig_mod", model)
    state = {own_name(name): tensor for name, tensor in state_dict.items()}
    targets = _targets_of_state(model, state)
    with _all_or_nothing(targets):
        if targets:
            _register(targets, "scratch")
        stored = _as_stored(model, state, strict)
        _check_fits(model, stored, strict)
        model.load_state_dict(stored, strict=strict)
        if targets:
            setattr(model, _PLAN, _plan_of_weights(targets))
    return model


# ---- the compact weights of a model ----


@dataclass(frozen=True)
class _Held:
    """A compact weight of a model: `module.attribute`, called `name`."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def originals(self) -> parametrize.ParametrizationList:
        return self.module.parametrizations[self.attribute]  # type: ignore[index, return-value]

    @property
    def parametrization(self) -> CompactWeight:
        return self.originals[0]  # type: ignore[return-value]

    def value(self) -> Tensor:
        value: Tensor = getattr(self.module, self.attribute)
        return value

    def factors(self) -> dict[str, nn.Parameter]:
        return {part: getattr(self.originals, f"original{i}") for i, part in enumerate(self.parametrization.shapes())}

    @property
    def prefix(self) -> str:
        """Of its names in `state_dict`."""
        path, _, attribute = self.name.rpartition(".")
        return f"{path}.parametrizations.{attribute}.".lstrip(".")

    def tied_names(self) -> list[str]:
        """What the dense weight is called too, where `untie` took it from a table: it may be saved under that name."""
        entry = self.parametrization.entry
        names = (entry.name, *entry.aliases) if entry.shared else ()
        own = next((name for name in names if f".{self.name}".endswith(f".{name}")), None)
        return [self.name.removesuffix(own) + name for name in names if name != own] if own else []

    def stored(self, dense: Tensor) -> dict[str, Tensor]:
        """What `state_dict` would hold if `dense` were assigned to the weight."""
        weight = self.parametrization
        factors = {f"{self.prefix}original{i}": part for i, part in enumerate(weight.right_inverse(dense))}
        return {**factors, f"{self.prefix}{_EXTRA_STATE}": weight.get_extra_state()}


def compact_weights(model: nn.Module) -> Iterator[_Held]:
    """All compact weights below `model`, each once."""
    for path, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for attribute, originals in list(module.parametrizations.items()):
            if isinstance(originals[0], CompactWeight):
                yield _Held(own_name(f"{path}.{attribute}".lstrip(".")), module, attribute)


def dense_parameters_of_compact_models() -> set[int]:
    """The ids of all parameters of all compact models that are alive: what `sparsify_` left dense is to stay so."""
    models = [module for module in _alive(nn.Module) if _PLAN in vars(module)]
    return {id(parameter) for model in models for parameter in model.parameters()}


def _alive(kind: type[T]) -> list[T]:
    """All objects of a class. By type, since asking an object for its class may run code of proxies."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


# ---- sparsify_ ----


@dataclass(frozen=True)
class _Target:
    """A weight that is to become compact."""

    entry: Entry
    module: nn.Module
    attribute: str
    weight: nn.Parameter
    parametrization: CompactWeight


def _check_model(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise CompactError(
            "a model under torch.inference_mode() cannot be trained", next_step="build it, and call this, outside of it"
        )
    held = next(compact_weights(model), None)
    if held is not None:
        raise CompactError("is compact already", site=held.name, next_step="densify_(model) first")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise CompactError(
            "DDP has registered the dense weights", next_step="sparsify_ the model first, then DistributedDataParallel"
        )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "FlatParameter":
            raise CompactError("is sharded", site=name, next_step="sparsify_ the model first, then fully_shard")


def _plan(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, config: Config, untie: bool) -> Plan:
    """The plan of the model, without what can only be projected at use: weights that stay tied."""
    positional = tuple(args) if isinstance(args, tuple | list) else (args,)
    if not positional and not kwargs:
        raise OptionError(
            "neither example inputs nor a plan", next_step="sparsify_(model, args), or sparsify_(model, plan=plan)"
        )
    found = capture(model, positional, kwargs)
    held_by = owners(model)
    sites = tuple(
        replace(site, reason=site.reason or _why_dense(site, held_by.get(site.parameter, ()), untie), trained=False)
        for site in found.sites  # factors are trained as they are: no step projects them
    )
    weights = dict(model.named_parameters()) if config.allocator == "error" else None
    config = config.replace(basis="svd")
    announcer.unmatched(config, model, found)
    names = weight_names(model, found)
    return make_plan(replace(found, sites=sites), config, weights=weights, training=True, names=names)


def _why_dense(site: Site, holders: Sequence[Owner], untie: bool) -> str | None:
    if not holders:
        return "no module of the model holds this weight"
    if not _is_matrix(site):
        return _PART
    if site.shared:
        if len(heads(holders, site.modules)) != 1:
            return "tied: what looks it up multiplies with it too, or several modules do"
        if not untie:
            return "tied to an embedding, and stays one with it; untie=True gives the matmul compact weights of its own"
    elif len(holders) > 1:
        return "tied: several modules share this weight, and it stays one"
    if any(isinstance(owner.module, parametrize.ParametrizationList) for owner in holders):
        return "parametrized already"
    return None


_PART = "a part of a parameter, or several matrices: it has no factors of its own"


def _is_matrix(site: Site | Entry) -> bool:
    """Is this one matrix, and all of a parameter?"""
    return (site.region or Region.whole(site.weight_shape)).is_matrix_of(site.weight_shape)


def _targets(model: nn.Module, plan: Plan, optimizer: str, untie: bool) -> list[_Target]:
    """The planned weights, found in the model; raises if this is not the model of the plan."""
    return [
        _target(entry, _owner(entry, holders, untie), optimizer)
        for entry, holders in planned(model, plan.entries)
        if entry.config is not None
    ]


def _owner(entry: Entry, holders: Sequence[Owner], untie: bool) -> Owner:
    """Who is to hold the factors of a weight; raises if it cannot have any."""
    exclude = "leave out `plan`, or make it with exclude=[...] of this name"
    if not _is_matrix(entry):
        raise CompactError(f"is {_PART}", site=entry.name, next_step=exclude)
    if entry.shared and entry.aliases and len(holders) == 1:
        raise PlanMismatchError("is tied in the plan, and not in the model", site=entry.name, next_step=REPLAN)
    alone = heads(holders, entry.heads) if entry.shared else holders
    if len(alone) != 1 or (entry.shared and not untie):
        raise CompactError(
            "is tied: what else uses this weight would not share it any more, if it were factors",
            site=entry.name,
            next_step=exclude if len(alone) != 1 else f"pass untie=True for factors of its own; or {exclude}",
        )
    return alone[0]


def _target(entry: Entry, owner: Owner, optimizer: str) -> _Target:
    new = CompactWeight.of(entry, optimizer, owner.weight.device, tuple(owner.module._parameters))
    return _Target(entry, owner.module, owner.attribute, owner.weight, new)


def _check_optimizers(weights: Sequence[nn.Parameter]) -> None:
    """Raise if an optimizer that is still in use would go on to train the weights that are about to be replaced."""
    ids = {id(weight) for weight in weights}
    for collect in (False, True):  # a discarded one may only wait for the collector
        if collect:
            gc.collect()
        holders = [
            optimizer
            for optimizer in _alive(torch.optim.Optimizer)
            if any(id(p) in ids for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        ]
        if not holders:
            return
    raise CompactError(
        f"an optimizer ({type(holders[0]).__name__}) already holds the weights that sparsify_ replaces",
        next_step="build the optimizer after sparsify_, and drop this one",
    )


@contextmanager
def _all_or_nothing(targets: Sequence[_Target]) -> Iterator[None]:
    """After an error the targets' modules hold their dense weights again, the same tensors in the same order."""
    before = [dict(target.module._parameters) for target in targets]
    try:
        yield
    except BaseException:
        for target, parameters in zip(targets, before, strict=True):
            if parametrize.is_parametrized(target.module, target.attribute):
                _unregister(target.module, target.attribute)
            target.module._parameters.update({target.attribute: target.weight})
            _order(target.module, tuple(parameters))
        raise


def _register(targets: Sequence[_Target], init: str) -> None:
    for target in targets:
        new = target.parametrization
        factors = new.from_scratch(target.weight) if init == "scratch" else new.right_inverse(target.weight)
        new.right_inverse = _always(factors)  # type: ignore[assignment]
        parametrize.register_parametrization(target.module, target.attribute, new)
        del new.right_inverse


def _always(factors: Factors) -> Callable[[Tensor], Factors]:
    return lambda weight: factors


def _unregister(module: nn.Module, attribute: str) -> None:
    """Take a parametrization away. Torch's way deletes the property from the class, which a deep copy shares."""
    kind = type(module)
    del module.parametrizations[attribute]  # type: ignore[operator, union-attr]
    if len(module.parametrizations):  # type: ignore[arg-type]
        others = {key: value for key, value in vars(kind).items() if key not in (attribute, "__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, others)
    else:
        del module.parametrizations
        module.__class__ = kind.__bases__[0]


def _order(module: nn.Module, names: Sequence[str]) -> None:
    """Put a module's parameters into this order, which is what optimizers' states go by."""
    for name in [name for name in names if name in module._parameters]:
        module._parameters[name] = module._parameters.pop(name)


def _say(plan: Plan, targets: Sequence[_Target], init: str) -> None:
    sites = sum(entry.is_site for entry in plan)
    if not targets:
        reason = "; ".join(plan.notes) or "every site is dense, plan_of(model) says why"
        log.warning("pixelfly: nothing was made compact: %s", reason)
        return
    log.warning(
        "pixelfly: %d of %d matmul weights are compact now, with %.1f%% of their elements; %.1f%% of the dense compute "
        "of all is kept. %s plan_of(model) lists all decisions.",
        len(targets),
        sites,
        100 * sum(target.entry.kept for target in targets) / sum(target.weight.numel() for target in targets),
        100 * plan.kept,
        "Their values are new: train the model, or keep what it has learned with init='project'."
        if init == "scratch"
        else f"Their relative error is {_errors(targets)}: fine-tune the model, or raise the budget.",
    )


@torch.no_grad()
def _errors(targets: Sequence[_Target]) -> str:
    """The range of relative weight errors, of one weight of each role."""
    by_role = {target.entry.role: target for target in targets if not target.weight.is_meta}
    errors = [
        projection.relative_error(target.weight, getattr(target.module, target.attribute))
        for target in by_role.values()
    ]
    return f"{min(errors):.2f} to {max(errors):.2f}" if errors else "unknown"


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"option {name!r} is {value!r}", next_step=f"valid: {', '.join(map(repr, choices))}")


# ---- load_weights_ ----


def _targets_of_state(model: nn.Module, state: Mapping[str, Tensor]) -> list[_Target]:
    """What is dense in the model and compact in `state`."""
    held = {weight.name for weight in compact_weights(model)}
    held_by = owners(model)
    targets = []
    for key in [key for key in state if key.endswith(_EXTRA_STATE)]:
        name = _weight_name(key)
        if name in held:
            continue
        if name not in held_by:
            raise PlanMismatchError(
                "compact in the state, and no weight of the model",
                site=name,
                next_step="load it into the same architecture",
            )
        owner = held_by[name][0]
        weight = owner.weight
        new = CompactWeight.from_extra_state(state[key], weight.device, tuple(owner.module._parameters))
        check_shape(name, weight.shape, new.entry.weight_shape, "among the weights to load")
        targets.append(_Target(new.entry, owner.module, owner.attribute, weight, new))
    if targets:
        if held:
            raise CompactError(
                "dense in the model, which is compact elsewhere, and compact among the weights to load",
                site=targets[0].entry.name,
                next_step="densify_(model) first",
            )
        _check_model(model)
        _check_optimizers([target.weight for target in targets])
    return targets


def _plan_of_weights(targets: Sequence[_Target]) -> Plan:
    """What is left of a plan in the weights that were saved: the compact ones, without what was dense and why."""
    entries = tuple(target.entry for target in targets)
    dense = sum(entry.dense_flops for entry in entries)
    kept = sum(entry.kept_flops for entry in entries) / max(dense, 1)
    notes = ("made of the weights that were loaded: what is not listed is dense",)
    return Plan(entries, kept, basis="svd", training=True, notes=notes)


def _as_stored(model: nn.Module, state: Mapping[str, Tensor], strict: bool) -> dict[str, Tensor]:
    """`state` with the names of `model.state_dict()`: dense weights projected, tied ones under all their names."""
    result = dict(state)
    for held in compact_weights(model):
        dense = result.pop(held.name, None)
        if dense is None and strict and not any(name.startswith(held.prefix) for name in state):
            dense = next((state[name] for name in held.tied_names() if name in state), None)
        if dense is not None:
            check_shape(held.name, dense.shape, held.parametrization.entry.weight_shape, "in the model")
            result |= held.stored(dense)
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        present = [name for name in tied if name in result]
        for other in present[1:]:
            if not torch.equal(result[other], result[present[0]]):
                raise CompactError(
                    f"differs from {present[0]} among the weights to load, and is one weight with it in the model",
                    site=other,
                    next_step="untie the two in the model first, giving each a parameter of its own",
                )
        result |= {name: result[present[0]] for name in tied if present}
    return result


def _check_fits(model: nn.Module, state: Mapping[str, Tensor], strict: bool) -> None:
    """Raise before anything is loaded: `load_state_dict` would have loaded the rest."""
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if strict and (missing or unexpected):
        raise CompactError(
            f"the weights do not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}",
            next_step="load the weights of the same architecture, or with strict=False what there is",
        )
    for held in compact_weights(model):
        if f"{held.prefix}{_EXTRA_STATE}" in state:
            held.parametrization.scales_in(state[f"{held.prefix}{_EXTRA_STATE}"])
    for name in expected.keys() & state.keys():
        if not name.endswith("_extra_state"):
            check_shape(name, state[name].shape, expected[name].shape, "in the model")


def _weight_name(key: str) -> str:
    """layer.parametrizations.weight.0._extra_state -> layer.weight"""
    path, _, rest = f".{key}".rpartition(".parametrizations.")
    return f"{path}.{rest.partition('.')[0]}".lstrip(".")
