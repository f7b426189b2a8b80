"""The values a plan is made of: an `Entry` for each weight, and the `Plan` that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pixelfly_compiler.errors import PlanError, PlanMismatchError, UnknownSiteError
from pixelfly_compiler.kernels.support import Support
from pixelfly_compiler.passes.regions import Region, overlap
from pixelfly_compiler.passes.sites import Site, SiteConfig

VERSION = 2
REPLAN = "make a plan for this model with pixelfly_compiler.plan(model, args)"


@dataclass(frozen=True)
class Entry:
    """What the plan says of one weight, or of the part `region` of one that a matmul uses by itself.

    A weight that no matmul uses has no role, and is not in the budget; `other_flops` are those of what else it does.
    """

    name: str
    weight_shape: tuple[int, ...]
    out_features: int = 0
    in_features: int = 0
    transposed: bool = False
    rows: int = 0
    rows_expr: str = "0"
    role: str = ""
    dtype: str = "float32"
    shared: bool = False
    heads: tuple[str, ...] = ()  # of a shared weight: the modules that multiply with it
    aliases: tuple[str, ...] = ()
    config: SiteConfig | None = None
    reason: str | None = None
    speedup: float | None = None
    region: Region | None = None
    matrices: int = 1  # that the weight holds; each row meets one of them
    other_flops: int = 0

    @property
    def parameter(self) -> str:
        """The name of the parameter: that of the entry, without the indices of a part."""
        return self.name if self.region is None else self.name.removesuffix(self.region.label(self.weight_shape))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Entry:
        """The entry that `dataclasses.asdict`, and JSON, made `values` of."""
        config, region = values["config"], values["region"]
        return cls(
            **values
            | {
                "weight_shape": tuple(values["weight_shape"]),
                "heads": tuple(values.get("heads", ())),
                "aliases": tuple(values["aliases"]),
                "config": None if config is None else SiteConfig(**config),
                "region": None if region is None else Region.from_dict(region),
            }
        )

    @property
    def box(self) -> tuple[range, ...]:
        """The indices of the parameter that it is of, or more."""
        return (self.region or Region.whole(self.weight_shape)).box(self.weight_shape)

    @property
    def is_site(self) -> bool:
        return bool(self.role)

    @property
    def kept(self) -> int:
        """Elements that the matmul computes with: kept ones and low-rank factors; all where it is dense."""
        if self.config is None:
            return self.out_features * self.in_features
        return self.config.kept(self.out_features, self.in_features)

    @property
    def kept_share(self) -> float:
        return self.kept / max(self.out_features * self.in_features, 1)

    @property
    def kept_flops(self) -> int:
        return 2 * self.rows * self.kept

    @property
    def dense_flops(self) -> int:
        return 2 * self.rows * self.out_features * self.in_features

    @property
    def decision(self) -> str:
        return "dense" if self.config is None else str(self.config)

    def support(self) -> Support:
        """The kept blocks of the (out, in) weight. A dense entry has none."""
        if self.config is None:
            raise PlanError(f"dense: {self.reason}", site=self.name, next_step="ask only for sites with a config")
        return self.config.support(self.out_features, self.in_features)


@dataclass(frozen=True)
class Plan:
    """All entries, in the order of the graph, and what they were made with. Frozen, hashable; `print` shows a table."""

    entries: tuple[Entry, ...]
    budget: float
    allocator: str = "proportional"
    basis: str = "fixed"
    training: bool = False
    notes: tuple[str, ...] = ()
    version: int = VERSION

    # ---- lookup ----

    @cached_property
    def _by_name(self) -> dict[str, Entry]:
        names = {alias: entry for entry in self.entries for alias in entry.aliases}
        return names | {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownSiteError(name, self._by_name) from None

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: str, weight_shape: Sequence[int] | None = None) -> Entry | None:
        """The entry of a weight that a graph calls `name`; None if there is none, or several that decide differently.

        After a graph break Dynamo may see a submodule as the root, and so only the end of the name; and one piece of
        code may serve several layers, which then must agree.
        """
        if name in self._by_name:
            return self._by_name[name]
        same = [entry for key, entry in self._by_name.items() if key.endswith(f".{name}")]
        if weight_shape is not None:
            same = [entry for entry in same if entry.weight_shape == tuple(weight_shape)]
        decisions = {(entry.config, entry.transposed) for entry in same}
        return same[0] if len(decisions) == 1 else None

    def of_parameter(self, name: str) -> Sequence[Entry]:
        """The entries of a parameter, which has one for each of its parts that is a site."""
        return self._by_parameter.get(name, ())

    @cached_property
    def _by_parameter(self) -> dict[str, list[Entry]]:
        entries: dict[str, list[Entry]] = {}
        for entry in self.entries:
            for name in (entry.parameter, *entry.aliases):
                entries.setdefault(name, []).append(entry)
        return entries

    def check(self, sites: Iterable[Site]) -> None:
        """Raise `PlanMismatchError` at the first site that the plan does not have, or has with another shape.

        `torch.export` finds parts of a weight where Dynamo finds none: of what the plan leaves dense they stay so.
        """
        for site in sites:
            entry = self.find(site.name, site.weight_shape) or self._by_name.get(site.name)
            if entry is None and self._leaves_dense(site):
                continue
            if entry is None:
                raise PlanMismatchError("not in the plan", site=site.name, next_step=REPLAN)
            if entry.weight_shape != site.weight_shape:
                raise PlanMismatchError(
                    f"has shape {site.weight_shape}, {entry.weight_shape} in the plan", site=site.name, next_step=REPLAN
                )
            if entry.config is not None and entry.region != site.region:
                raise PlanMismatchError(
                    f"is laid out as {site.region}, as {entry.region} in the plan", site=site.name, next_step=REPLAN
                )
            if entry.config is not None and entry.transposed != site.transposed:
                raise PlanMismatchError(
                    f"is used {_orientation(site.transposed)}, {_orientation(entry.transposed)} in the plan",
                    site=site.name,
                    next_step=REPLAN,
                )

    def _leaves_dense(self, site: Site) -> bool:
        """Does the plan know the weight of this site, and make nothing sparse that the site uses?"""
        entries = [entry for entry in self.of_parameter(site.parameter) if entry.weight_shape == site.weight_shape]
        return bool(entries) and not any(entry.config and overlap(entry.box, site.box) for entry in entries)

    # ---- totals ----

    @property
    def sparse(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.config is not None)

    @property
    def kept(self) -> float:
        """Share of the dense compute of all sites that is kept."""
        return sum(entry.kept_flops for entry in self.entries) / max(sum(e.dense_flops for e in self.entries), 1)

    @property
    def dense_flops(self) -> int:
        """Flops of everything that multiplies with a weight, sites and others, if all of it were dense."""
        return sum(entry.dense_flops + entry.other_flops for entry in self.entries)

    @cached_property
    def digest(self) -> str:
        """A hash of what decides results, the same in every process: for cache keys."""
        decisions = [(e.name, e.weight_shape, repr(e.region), e.transposed, repr(e.config)) for e in self.entries]
        return blake2b(json.dumps([self.version, self.basis, decisions]).encode(), digest_size=16).hexdigest()

    # ---- text ----

    def __str__(self) -> str:
        from pixelfly_compiler.report import render

        return render(self)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or "entries" not in values:
                raise ValueError("no 'entries' in it")
            if values.get("version") != VERSION:
                raise PlanError(
                    f"plan of version {values.get('version')}, this pixelfly reads {VERSION}", next_step=REPLAN
                )
            return cls(
                **values | {"entries": tuple(map(Entry.from_dict, values["entries"])), "notes": tuple(values["notes"])}
            )
        except (ValueError, TypeError, KeyError) as cause:
            raise PlanError(f"not a plan: {cause}", next_step="read only what plan.to_json() wrote") from cause

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            return cls.from_json(Path(path).read_text())
        except OSError as cause:
            raise PlanError(
                f"cannot read a plan from {path}: {cause}", next_step="plan.save(path) writes one"
            ) from cause


def _orientation(transposed: bool) -> str:
    return "as (in, out)" if transposed else "as (out, in)"
