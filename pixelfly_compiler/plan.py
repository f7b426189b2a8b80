"""Make a plan: for every weight either a `SiteConfig` or dense with the reason.

plan(model, args)  -->  capture the graphs, find sites, `make_plan`    (compiles nothing)
make_plan(found)   -->  candidates per site, one role for repeated layers, allocate the budget
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pixelfly_compiler.capture import capture
from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.kernels.support import max_strides
from pixelfly_compiler.names import weight_names
from pixelfly_compiler.oracle import project, project_, rescale_
from pixelfly_compiler.passes import candidates as ways
from pixelfly_compiler.passes.allocate import FILL, Allocation, Option, Role, allocate
from pixelfly_compiler.passes.calibration import device_for
from pixelfly_compiler.passes.cost import Device, dense_time, sparse_time
from pixelfly_compiler.passes.sites import Found, Site, SiteConfig, Skipped

Decisions = dict[str, tuple[SiteConfig | None, str | None]]  # site name -> config, reason if dense

__all__ = ["Entry", "Plan", "make_plan", "plan", "project", "project_", "rescale_"]


def plan(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: Device | None = None,
    training: bool | None = None,
    **options: Any,
) -> Plan:
    """Decide for every weight of `model`, from one run of `model(*args, **kwargs)`; compiles and changes nothing.

    `args` is a tuple, or one tensor. `options` are those of `Config`: budget=0.25, allocator=, block_size=, ...
    `device` holds the time model's constants; `training` (default: as the model is, where gradients are on) decides
    for whole steps of training, with gradients and the projection of the weights, and runs with gradients on.
    """
    config, others = Config.from_options(options)
    if others:
        raise TypeError(f"plan() got an unexpected option {next(iter(others))!r}")
    positional = tuple(args) if isinstance(args, tuple | list) else (args,)
    if training is None:
        trained = any(parameter.requires_grad for parameter in model.parameters())
        training = model.training and torch.is_grad_enabled() and trained
    found = capture(model, positional, kwargs, training=training)
    weights = dict(model.named_parameters()) if config.allocator == "error" else None
    return make_plan(found, config, weights=weights, device=device, training=training, names=weight_names(model, found))


def make_plan(
    found: Found,
    config: Config,
    *,
    weights: Mapping[str, Tensor] | None = None,
    device: Device | None = None,
    training: bool = False,
    decided: Mapping[str, Entry] | None = None,
    names: Collection[str] = (),
) -> Plan:
    """The plan for what `find_sites` found, within `config.budget`.

    `weights` (by name) let the allocator "error" see real errors. `decided` are entries of earlier graphs of the same
    model: they stay as they are, so that training and evaluation, or two batch sizes, mean the same. `names` are all of
    the model's: what the user names and is none of them is noted.
    """
    if config.plan is not None:
        config.plan.check(found.sites)
        return config.plan
    members = _members(found.sites)
    decided = decided or {}
    notes: list[str] = []
    choice: Decisions = {}
    reasons = _reasons(found.sites, config)
    for site in found.sites:
        if site.name in decided:
            choice[site.name] = (decided[site.name].config, decided[site.name].reason)
        elif site.name in reasons:
            choice[site.name] = (None, reasons[site.name])
    problem = _Problem(members, config, device, weights or {}, choice, training)
    allocation = problem.solve()
    if allocation.note:
        notes.append(allocation.note)
    decisions = problem.decisions(allocation)
    choice |= _varied(found.sites, decisions) if config.vary_strides else decisions
    entries = [_site_entry(site, *choice[site.name], problem.device_of(site), training) for site in found.sites]
    entries += [_skipped_entry(item) for item in found.skipped]
    if names:
        notes += config.why_unmatched(names)
    if training and found.second_derivatives:
        asked = "the forward asks for gradients that are to be differentiated again (create_graph=True)"
        notes.append(f"{asked}: torch.compile has no second derivatives, and a step of training may raise")
    if not found.sites:
        notes.append("no site: no matmul here has a parameter as its weight, so everything runs dense")
    return Plan(tuple(entries), config.budget, config.allocator, config.basis, training, tuple(notes))


def _reasons(sites: Iterable[Site], config: Config) -> dict[str, str]:
    """Why sites must stay dense: their own reason, the user's, or that of one which shares their code."""
    reasons = {site.name: site.reason or config.excludes((site.name, site.parameter, *site.aliases)) for site in sites}
    own = {name: reason for name, reason in reasons.items() if reason is not None}
    shared = {site.name: next((name for name in site.namesakes if name in own), None) for site in sites}
    return {
        name: f"after a graph break its code also runs for {other}, which stays dense"
        for name, other in shared.items()
        if other is not None
    } | own


def _members(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Role -> sites; those that share code share a role. An ineligible or excluded site is in no one's way: it is dealt
    with before.
    """
    members: dict[str, list[Site]] = {}
    role_of: dict[str, str] = {}
    for site in sites:
        role = next((role_of[name] for name in site.namesakes if name in role_of), site.role)
        role_of[site.name] = role
        members.setdefault(f"{role}|{site.dtype}|{site.device}", []).append(site)
    return members


class _Problem:
    """The budget as numbers: an allocator's roles, and the way back from its choices to configs."""

    def __init__(
        self,
        members: Mapping[str, list[Site]],
        config: Config,
        device: Device | None,
        weights: Mapping[str, Tensor],
        choice: Decisions,
        training: bool,
    ) -> None:
        self.config, self.device, self.weights, self.training = config, device, weights, training
        self.free = {role: [s for s in sites if s.name not in choice] for role, sites in members.items()}
        self.free = {role: sites for role, sites in self.free.items() if sites}
        fixed = [(site, *choice[site.name]) for sites in members.values() for site in sites if site.name in choice]
        self.fixed = [(site, _kept_flops(site, settled), settled) for site, settled, _ in fixed]
        first = next((site for sites in self.free.values() for site in sites), None)
        preferred = self.device_of(first).blocks if first else ()
        self.blocks = (config.block_size,) if config.block_size else preferred
        self._ways: dict[tuple[str, int], list[ways.Candidate]] = {}

    def device_of(self, site: Site) -> Device:
        return self.device or device_for(site.device)

    def solve(self) -> Allocation:
        """Allocate with as few small blocks as meet the budget."""
        levels = {role: self._level(role) for role in self.free}
        while True:
            self.chosen = {role: self._candidates(role, level) for role, level in levels.items()}
            allocation = allocate(self._roles(), self.config.budget, self.config.allocator)
            met = FILL * allocation.limit <= allocation.kept <= allocation.limit * (1 + 1e-9)
            finer = {role: min(level + 1, len(self.blocks)) for role, level in levels.items()}
            if met or finer == levels:
                return allocation
            levels = finer

    def _level(self, role: str) -> int:
        """How many block sizes, in order of preference, this role needs to come near the budget by itself."""
        target = self.config.budget * self.free[role][0].elements
        for least_strides in (1, 0) if self.config.vary_strides else (0,):
            for level in range(1, len(self.blocks) + 1):
                mixing = (way for way in self._candidates(role, level) if way.config.strides >= least_strides)
                if any(ways.NEAR * target <= way.kept <= 1.25 * target for way in mixing):
                    return level
        return len(self.blocks)

    def _candidates(self, role: str, level: int) -> list[ways.Candidate]:
        key = (role, level)
        if key not in self._ways:
            self._ways[key] = self._found(role, level, self.training)
        return self._ways[key]

    def _found(self, role: str, level: int, training: bool) -> list[ways.Candidate]:
        site = self._typical(role)
        return ways.candidates(
            site,
            self.blocks[:level],
            self.device_of(site),
            budget=self.config.budget,
            lowrank_share=self.config.lowrank_share,
            training=training,
            force=self.config.force,
            mixing=self.config.vary_strides,
            most_strides=256 if self.config.allocator == "proportional" else 48,
        )

    def _typical(self, role: str) -> Site:
        """The site that decides for all: one that is trained, if any is."""
        sites = self.free[role]
        return next((site for site in sites if site.trained), sites[0])

    def _roles(self) -> list[Role]:
        roles = [self._role(role) for role in self.free]
        for site, kept, settled in self.fixed:
            dense = float(_kept_flops(site, None))
            options = () if settled is None else (Option(kept, 0.0),)
            roles.append(Role(site.name, dense, options, may_be_dense=False))
        return roles

    def _role(self, role: str) -> Role:
        sites, found = self.free[role], self.chosen[role]
        rows = sum(max(site.rows, 1) for site in sites)
        options = tuple(
            Option(2.0 * rows * way.kept, way.time * len(sites), error, way.order)
            for way, error in zip(found, self._errors(role), strict=True)
        )
        return Role(role, 2.0 * rows * sites[0].elements, options, may_be_dense=not self.config.force)

    def _errors(self, role: str) -> list[float]:
        """What each candidate of a role loses, summed over its sites.

        Relative errors are squared once more: a little lost everywhere is better than all lost in one place.
        """
        configs = [way.config for way in self.chosen[role]]
        if self.config.allocator == "proportional":
            return [0.0] * len(configs)
        total = [0.0] * len(configs)
        for site in self.free[role]:
            errors = ways.relative_errors(site, configs, self.weights.get(site.parameter))
            total = [sum_ + site.matrices * site.elements * error**2 for sum_, error in zip(total, errors, strict=True)]
        return total

    def decisions(self, allocation: Allocation) -> Decisions:
        """Of the sites that were free."""
        decided: Decisions = {}
        for (role, sites), choice in zip(self.free.items(), allocation.choices, strict=False):
            if choice is None:
                outcome: tuple[SiteConfig | None, str | None] = (None, self._why_dense(role))
            else:
                outcome = (self.chosen[role][choice].config, None)
            decided |= {site.name: outcome for site in sites}
        return decided

    def _why_dense(self, role: str) -> str:
        if self.chosen[role]:
            return "the budget has room for it: dense loses nothing here"
        site = self._typical(role)
        finest = self.blocks[-1]
        if min(site.out_features, site.in_features) <= finest:
            return f"too small: its shorter side is one block of {finest}"
        if self.training and self._found(role, len(self.blocks), training=False):
            return f"its projection costs a training step more than {site.rows} rows gain; sparsify_ has no such cost"
        return "no sparse form is predicted faster than dense"


def _varied(sites: Sequence[Site], decisions: Decisions) -> Decisions:
    """The decisions with strides that begin where those of the site before end: site by site, all are used. Sites that
    share code cannot differ.
    """
    varied: Decisions = {}
    place = 0
    for site in sites:
        config = decisions.get(site.name, (None, None))[0]
        if config is None:
            continue
        if (twin := next((name for name in site.namesakes if name in varied), None)) is not None:
            varied[site.name] = varied[twin]
            continue
        others = max_strides(site.out_features, site.in_features, config.block)
        first = place * config.strides % others if config.strides else place % (others + 1)
        varied[site.name] = (replace(config, first=first), None)
        place += 1
    return decisions | varied


def _kept_flops(site: Site, config: SiteConfig | None) -> float:
    kept = site.elements
    if config is not None:
        kept = config.kept(site.out_features, site.in_features)
    return 2.0 * max(site.rows, 1) * max(kept, 1)  # an empty weight costs next to nothing, and never divides by zero


def _site_entry(site: Site, config: SiteConfig | None, reason: str | None, device: Device, training: bool) -> Entry:
    speedup = None
    if config is not None:
        speedup = dense_time(site, device, training) / sparse_time(site, config, device, training)
    return Entry(
        name=site.name,
        weight_shape=site.weight_shape,
        out_features=site.out_features,
        in_features=site.in_features,
        transposed=site.transposed,
        rows=site.rows,
        rows_expr=site.rows_expr,
        role=site.role,
        dtype=site.dtype,
        shared=site.shared,
        heads=site.modules if site.shared else (),
        aliases=site.aliases,
        config=config,
        reason=reason,
        speedup=speedup,
        region=site.region,
        matrices=site.matrices,
        other_flops=site.other_flops,
    )


def _skipped_entry(item: Skipped) -> Entry:
    return Entry(item.name, item.shape, aliases=item.aliases, reason=item.reason, other_flops=item.flops)
