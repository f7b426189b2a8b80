"""Every family of transformers that can be built small, compiled and compared with the oracle, as one table.

    python tests/families.py [--compiled] [--limit SECONDS] [FAMILY ...]

Configurations are the defaults with their sizes cut down, without downloads; a family that cannot be built, or fed, by
these rules is listed as such. The rewritten graphs run node by node, without a C++ compiler, or, a minute each, as
TorchInductor compiles them. Each family has a process of its own, which is stopped when it takes too long. Failures
come first.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from family_models import build
from rich.console import Console
from rich.progress import track
from rich.table import Table
from test_zoo import OPTIONS, assert_equals_the_oracle, step
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import WeightFlops

from pixelfly_compiler import backend
from pixelfly_compiler.decision import Plan
from pixelfly_compiler.errors import PlanError
from pixelfly_compiler.plan import plan, project_


@dataclass(frozen=True)
class Row:
    """What became of a family: `rank` sorts the table, `covered` is the sites' share of the flops of weights."""

    rank: int
    family: str
    model: str
    covered: str
    outcome: str


def check(family: str, compiled: bool = False) -> Row:
    torch._dynamo.reset()
    try:
        model, given = build(family)
    except Exception as cause:
        return Row(3, family, "", "", f"not built: {_first_line(cause)}")
    name = type(model).__name__
    # A layer whose code Dynamo has compiled too often already runs in Python, with its dense weights.
    with torch._dynamo.config.patch(recompile_limit=100):
        try:
            graphs = _graphs(model, given)
        except Exception as cause:
            return Row(3, family, name, "", f"not compiled, also with backend='eager': {_first_line(cause)}")
        try:
            return _compare(family, model, given, OPTIONS, graphs, compiled)
        except Exception as cause:
            return Row(0, family, name, "", f"FAILED: {_first_line(cause)}")


def check_apart(family: str, compiled: bool, limit: float) -> Row:
    """The same in a process of its own: what crashes, hangs or eats up the memory does so there."""
    fork = multiprocessing.get_context("fork")  # transformers is imported once
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(check(family, compiled)))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else Row(0, family, "", "", f"FAILED: not done in {limit:.0f} s")
    except EOFError:
        return Row(0, family, "", "", "FAILED: its process died")
    finally:
        child.kill()
        child.join()


def _compare(
    family: str, model: nn.Module, given: dict[str, Tensor], options: dict[str, Any], graphs: int, compiled: bool
) -> Row:
    """`graphs`: how many Dynamo makes of a step without us."""
    made = plan(model, (), given, **options)
    with torch.no_grad(), WeightFlops(model) as counter:
        model(**given)
    torch._dynamo.reset()
    counters.clear()
    found = sum(entry.dense_flops for entry in made if entry.is_site)
    covered = f"{found / max(counter.weight, 1):.1%}"
    once = options if graphs == 1 else {"plan": made}  # or the budget would be split over each graph by itself
    with nullcontext() if compiled else patch.object(backend, "inductor", lambda gm, inputs, patches: gm.forward):
        try:
            assert_equals_the_oracle(model, given, made, **once)
        except PlanError as cause:  # no oracle for this weight
            excluded = options.get("exclude", [])
            if not cause.site or cause.site in excluded:
                raise
            return _compare(family, model, given, options | {"exclude": [*excluded, cause.site]}, graphs, compiled)
        except AssertionError:
            change = _changed_by_dynamo(model, given, made, once)
            if change is None:
                raise
            outcome = f"outputs equal to the oracle's with backend='eager', which differ from its own by {change:.1%}"
            return Row(1, family, type(model).__name__, covered, outcome)
    notes = [f"{made.dense_flops:,} flops planned, {counter.weight:,} counted"] * (made.dense_flops != counter.weight)
    if counters["stats"]["unique_graphs"] != graphs:
        notes.append(f"{counters['stats']['unique_graphs']} graphs, {graphs} without us")
    notes += [f"{entry.name} dense: {entry.reason}" for entry in made if entry.is_site and not entry.config]
    return Row(1 if notes else 2, family, type(model).__name__, covered, "; ".join(notes) or "equal")


def _changed_by_dynamo(model: nn.Module, given: dict[str, Tensor], made: Plan, options: dict[str, Any]) -> float | None:
    """How much tracing alone changes the outputs of the oracle, if ours are changed in the same way."""
    exact = project_(copy.deepcopy(model), made)
    traced = torch.compile(copy.deepcopy(exact), backend="eager")
    ours = torch.compile(copy.deepcopy(model), backend="pixelfly", options=options)
    outputs, of_traced, expected = (step(each, given)[0] for each in (ours, traced, exact))
    change = max(_error(y, other) for y, other in zip(of_traced, expected, strict=True))
    rest = max(_error(y, other) for y, other in zip(outputs, of_traced, strict=True))
    return change if change > 1e-5 and rest <= max(1e-5, 1e-3 * change) else None


def _error(y: Tensor, other: Tensor) -> float:
    return float((y - other).norm() / other.norm().clamp(min=1e-30))


def _graphs(model: nn.Module, given: dict[str, Tensor]) -> int:
    """How many graphs Dynamo makes of a step."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(copy.deepcopy(model), backend="eager")(**given)
    return int(counters["stats"]["unique_graphs"])


def _first_line(cause: Exception) -> str:
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:160]


def main(argv: Sequence[str]) -> None:
    """Check these families, or all, and print the table."""
    from transformers import CONFIG_MAPPING

    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("families", nargs="*", metavar="FAMILY")
    flags.add_argument("--compiled", action="store_true", help="by TorchInductor")
    flags.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for a family (default: 600)")
    args = flags.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    families = args.families or sorted(CONFIG_MAPPING.keys())
    rows = [check_apart(family, args.compiled, args.limit) for family in track(families)]
    table = Table("family", "model", "covered", "outcome", box=None)
    for row in sorted(rows, key=lambda row: (row.rank, row.family)):
        table.add_row(row.family, row.model, row.covered, row.outcome)
    Console().print(table)
    failed = sum(row.rank == 0 for row in rows)
    equal = sum(row.rank in (1, 2) for row in rows)
    print(f"{failed} failed, {equal} equal to the oracle, or to what Dynamo makes of it")


if __name__ == "__main__":
    main(sys.argv[1:])
