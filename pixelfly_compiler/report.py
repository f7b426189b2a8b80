"""A plan as a table for a terminal, and what is logged at compile."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pixelfly_compiler.config import Config
from pixelfly_compiler.decision import Entry, Plan
from pixelfly_compiler.kernels import projection
from pixelfly_compiler.names import weight_names
from pixelfly_compiler.oracle import project
from pixelfly_compiler.passes.sites import Found

if TYPE_CHECKING:
    from pixelfly_compiler.emit import Emission


def render(plan: Plan, width: int | None = None) -> str:
    """The table as plain text, repeated layers folded into one row."""
    width = width or max(get_terminal_size((120, 40)).columns, 40)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(table(plan))
    for line in summary(plan):
        console.print(line, markup=False, highlight=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def render_emission(emission: Emission) -> str:
    """The kernels as a table, ours first."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("kernel", overflow="fold", ratio=4)
    result.add_column("sites", overflow="fold", ratio=3)
    for column in ("graph", "registers", "spills", "shared", "tensor core", "predicted"):
        result.add_column(column, justify="right", overflow="fold")
    for kernel in sorted(emission.kernels, key=lambda kernel: not kernel.sites):
        cores = ", ".join(f"{count} {kind}" for kind, count in kernel.tensor_core.items())
        sites = f"{_common_name(kernel.sites)} ({len(kernel.sites)})" if kernel.sites else ""
        seconds = "" if kernel.seconds is None else f"{kernel.seconds * 1e6:.1f} us"
        shared = f"{kernel.shared_memory / 1024:.0f} KiB"
        usage = [kernel.graph, str(kernel.registers), str(kernel.spills), shared, cores, seconds]
        result.add_row(kernel.name, sites, *usage)
    console = Console(file=io.StringIO(), width=160, color_system=None, legacy_windows=False)
    console.print(
        f"{emission.target}: {len(emission.kernels)} kernels, {len(emission.wrappers)} graphs", highlight=False
    )
    console.print(result)
    served = {site for kernel in emission.kernels for site in kernel.sites}
    without = [entry.name for entry in emission.plan.sparse if entry.name not in served]
    if without:
        console.print(
            f"No kernel serves {_common_name(without)} ({len(without)}), though the plan makes it sparse: nothing uses "
            "its result, or its graph could not be compiled, as TORCH_LOGS=graph_breaks tells."
        )
    elif not served:
        console.print(
            "Nothing is sparse, the plan says why. Where no sparse form is predicted faster, more rows "
            "(a larger batch) may make one so; --force (force=True) makes sites sparse all the same."
        )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def table(plan: Plan) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("site", overflow="fold", ratio=5)
    result.add_column("n", justify="right")
    result.add_column("out x in", justify="right", overflow="fold")
    result.add_column("rows", justify="right", overflow="fold")
    result.add_column("decision", overflow="fold", ratio=4)
    result.add_column("kept", justify="right")
    result.add_column("speed", justify="right")
    for entries in fold(plan.entries):
        result.add_row(*_row(entries))
    return result


def fold(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries that share role, shape, rows and decision, wherever their strides begin; what no matmul uses is last."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: not entry.is_site):
        config = entry.config and replace(entry.config, first=0)
        key = (entry.role or entry.name, entry.weight_shape, entry.rows, config, entry.reason)
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def _row(entries: Sequence[Entry]) -> list[str]:
    first = entries[0]
    name = _common_name([entry.name for entry in entries])
    names = f"{name} (= {', '.join(first.aliases)})" if first.aliases and len(entries) == 1 else name
    if not first.is_site:
        return [names, "", " x ".join(map(str, first.weight_shape)), "", f"not a site: {first.reason}", "", ""]
    rows = first.rows_expr if first.rows_expr.isdigit() else f"{first.rows_expr} ({first.rows})"
    several = f"{first.matrices} of " if first.matrices > 1 else ""
    shape = f"{several}{first.out_features} x {first.in_features}"
    configs = {entry.config for entry in entries}
    decision = first.decision if first.reason is None else f"dense: {first.reason}"
    if len(configs) > 1 and first.config is not None:
        decision = f"{replace(first.config, first=0)}, varied"
    speed = "" if first.speedup is None else f"{first.speedup:.1f}x"
    return [names, str(len(entries)), shape, rows, decision, f"{first.kept_share:.1%}", speed]


def _common_name(names: Sequence[str]) -> str:
    """layers.0.fc and layers.1.fc -> layers.*.fc; those of another depth after a comma."""
    by_length: dict[int, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        by_length.setdefault(len(parts), []).append(parts)
    patterns = (zip(*alike, strict=True) for alike in by_length.values())
    return ", ".join(".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns) for columns in patterns)


def summary(plan: Plan) -> list[str]:
    """The totals, then the notes."""
    sites = [entry for entry in plan.entries if entry.is_site]
    lines = [
        f"{len(plan.sparse)} of {len(sites)} sites sparse; {plan.kept:.1%} of their dense compute kept "
        f"(budget {plan.budget:.1%}, {plan.allocator}); matmuls predicted {predicted_speedup(sites):.1f}x faster"
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def predicted_speedup(sites: Sequence[Entry]) -> float:
    """Over all sites, each weighted by its dense flops: Amdahl's law."""
    dense = sum(entry.dense_flops for entry in sites)
    sparse = sum(entry.dense_flops / (entry.speedup or 1.0) for entry in sites)
    return dense / sparse if sparse else 1.0


log = logging.getLogger("pixelfly_compiler")


class Announcer:
    """Says once per model what its compiled form computes. What it has said is forgotten with `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._said: set[str] = set()
        self._models: WeakKeyDictionary[nn.Module, set[Config]] = WeakKeyDictionary()  # whose names were looked at
        self._sparse = False  # has any graph been made sparse?

    def sparse(self, plan: Plan, found: Found, weights: Mapping[str, Tensor], whole: bool) -> None:
        """A graph was made sparse; `weights` are the sparse ones. Of a model in pieces the first warns for all."""
        self._sparse = True
        if not self._first_time(plan.digest):
            return
        level = logging.WARNING if whole or self._first_time("a piece") else logging.INFO
        errors = _errors(plan, weights)
        log.log(
            level,
            "pixelfly: %d of %d matmul weights%s run sparse, %.1f%% of the dense compute is kept; their relative "
            "weight error is %.2f to %.2f. The compiled model computes with projected weights: train or fine-tune it, "
            "raise the budget (options={'budget': ...}), or exclude weights. pixelfly_compiler.plan(model, args) lists "
            "all decisions.",
            len(weights),
            len(found.sites),
            "" if whole else " in the first graph (Dynamo broke the model into several)",
            100 * plan.kept,
            min(errors),
            max(errors),
        )

    def watch(self, compiled: Callable[..., Any], plan: Plan, whole: bool) -> Callable[..., Any]:
        """The code of a graph without anything sparse. That calls for a warning, unless another piece is sparse:
        a piece of a model waits for its second run, when all others have been compiled.
        """
        if whole:
            self.nothing_sparse(plan)
            return compiled
        runs = 0

        def run(*args: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 2 and not self._sparse:
                self.nothing_sparse(plan)
            return compiled(*args)

        return run

    def nothing_sparse(self, plan: Plan) -> None:
        """A whole model stays dense."""
        if self._first_time("nothing" if not plan.entries else plan.digest):
            dense = [entry for entry in plan.entries if entry.is_site and entry.reason]
            reason = "; ".join(plan.notes) or "every site here is dense"
            if dense:
                largest = max(dense, key=lambda entry: entry.dense_flops)
                reason = f"{largest.name}: {largest.reason}"
            log.warning(
                "pixelfly: nothing was made sparse: %s. pixelfly_compiler.plan(model, args) lists all decisions.",
                reason,
            )

    def used_otherwise(self, name: str, where: str, how: str) -> None:
        """A graph uses a weight in another way than it is sparse in: dense, or another part of it."""
        if self._first_time(f"{name} otherwise"):
            log.warning(
                "pixelfly: %s is sparse in %s and used otherwise in another graph, which so computes another function: "
                "%s. If the size of an input decides which part of it is used, exclude it (options={'exclude': %r})",
                name,
                where,
                how,
                name,
            )

    def unmatched(self, config: Config, model: nn.Module, found: Found, level: int = logging.WARNING) -> None:
        """Globs of the user's that match nothing of a model. It is looked for once, whatever the number of graphs."""
        looked_at = self._models.setdefault(model, set())
        if not (config.include or config.exclude) or config in looked_at:
            return
        looked_at.add(config)
        for text in config.why_unmatched(weight_names(model, found)):
            if self._first_time(text):
                log.log(level, "pixelfly: %s", text)

    def stay_dense(self, reasons: Mapping[str, str]) -> None:
        """Weights that could be sparse in this graph, and are not: another graph of the model uses them densely."""
        new = [name for name in reasons if self._first_time(f"{name} stays dense")]
        if new:
            others = f", as do {len(new) - 1} others" if len(new) > 1 else ""
            log.warning("pixelfly: %s stays dense here%s: %s", new[0], others, reasons[new[0]])

    def _first_time(self, key: str) -> bool:
        new = key not in self._said
        self._said.add(key)
        return new


announcer = Announcer()


@torch.no_grad()
def _errors(plan: Plan, weights: Mapping[str, Tensor]) -> list[float]:
    """Relative weight error of one weight of each role: layers of a role are alike."""
    by_role = {entry.role: (weight, entry) for name, weight in weights.items() if (entry := plan.find(name))}
    return [
        projection.relative_error(weight, project(weight.detach(), entry, plan.basis))
        for weight, entry in by_role.values()
    ]
