"""Is any site that the plan makes sparse slower than dense? One layer at a time, at every number of rows.

    python benchmarks/never_slower.py --quick --prepare     # compiles what the next command runs
    python benchmarks/never_slower.py --quick               # under three minutes, on a quiet machine
    python benchmarks/never_slower.py                       # all sizes

For each layer the plan decides as it does for users, for each number of rows. Every distinct decision is compiled once,
by `torch.compile(layer, backend="pixelfly")`, and runs at all numbers of rows beside `torch.compile(layer)`, since a
weight has one decision for all of its life. `own` marks the numbers of rows that make this decision. Operands stay in
the caches where they fit. That favours dense, which has more to read.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _common import DTYPES, append_rows, dtypes_here, interleave, print_table, relative_error
from torch import Tensor, nn

from pixelfly_compiler import Plan, project, project_
from pixelfly_compiler.capture import capture
from pixelfly_compiler.config import Config
from pixelfly_compiler.passes.sites import Found
from pixelfly_compiler.plan import make_plan

SQUARES = (64, 96, 128, 200, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 4096, 8192)
WIDER = [(n, 4 * n) for n in (64, 128, 256, 512, 768, 1024, 2048)]
SHAPES = [*((n, n) for n in SQUARES), *WIDER, *((b, a) for a, b in WIDER), (1000, 3000), (777, 1333)]  # in, out
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_SHAPES = [(64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 512), (768, 3072), (777, 1333)]
QUICK_ROWS = (1, 4, 16, 64, 256, 2048)
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, Frobenius
MOST_FLOPS = 2e11  # of one dense call
LEAST_SECONDS = 1e-3  # of one measurement: shorter calls are repeated
ALLOWED = 0.97  # the promise


@dataclass(frozen=True)
class Layer:
    """A linear layer as a user has it, to be trained or not."""

    inputs: int
    outputs: int
    dtype: str
    training: bool

    def module(self) -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(self.inputs, self.outputs, dtype=DTYPES[self.dtype]).requires_grad_(self.training)

    def x(self, rows: int) -> Tensor:
        """Random rows, which Dynamo takes as dynamic but for a single one."""
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, self.inputs, generator=generator).to(DTYPES[self.dtype]).requires_grad_(self.training)
        if rows > 1:
            torch._dynamo.mark_dynamic(x, 0)
        return x

    def flops(self, rows: int) -> float:
        return (6.0 if self.training else 2.0) * rows * self.inputs * self.outputs


# ----------------------------------------------------------------------------------------------------------- decisions


def plans(layer: Layer, rows: Sequence[int], config: Config) -> dict[int, Plan]:
    """What is decided at each number of rows."""
    found = capture(layer.module(), (layer.x(2),))
    return {count: make_plan(_with_rows(found, count), config, training=layer.training) for count in rows}


def _with_rows(found: Found, rows: int) -> Found:
    return replace(found, sites=tuple(replace(site, rows=rows) for site in found.sites))


def decision(plan: Plan) -> str:
    return plan["weight"].decision


# ----------------------------------------------------------------------------------------------------------- measuring

Run = Callable[[], Any]


def step(module: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> Run:
    """One call: inference, or forward and backward on a weight that an optimizer has just changed."""
    if not weight.requires_grad:
        return functools.partial(module, x)
    gradient = torch.ones(len(x), len(weight), dtype=x.dtype)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        torch.autograd.graph.increment_version(weight)
        y = module(x)
        x_grad, weight_grad = torch.autograd.grad(y, (x, weight), gradient)
        return y, x_grad, weight_grad

    return run


def onednn(module: nn.Linear, x: Tensor) -> Run:
    return lambda: torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")


def check(layer: Layer, plan: Plan, run: Run, x: Tensor) -> float:
    """Relative error against the oracle in float64, of inference for the last rows; an error where it is too large."""
    oracle = layer.module()
    project_(oracle, plan)
    oracle.double()
    if layer.training:
        y, x_grad, weight_grad = step(oracle, oracle.weight, x.detach().double().requires_grad_())()
        pairs = zip(run(), (y, x_grad, project(weight_grad, plan["weight"])), strict=True)
    else:
        pairs = zip((run()[-64:],), (oracle(x[-64:].double()),), strict=True)
    worst = max(relative_error(result.detach(), truth.detach()) for result, truth in pairs)
    if not worst <= TOLERANCE[layer.dtype]:
        raise AssertionError(f"{layer}, {len(x)} rows, {decision(plan)}: relative error {worst:.1e}")
    return worst


def repeated(run: Run) -> tuple[Run, int]:
    """`run`, as often as one measurement must hold it; run before, for it may compile."""
    start = time.perf_counter()
    run()
    times = int(LEAST_SECONDS / (time.perf_counter() - start)) + 1

    def several() -> None:
        for _ in range(times):
            run()

    return several, times


def measure(layer: Layer, made: Mapping[int, Plan], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each distinct sparse decision and number of rows."""
    for plan in {decision(plan): plan for plan in made.values() if plan.sparse}.values():
        torch._dynamo.reset()
        dense, sparse = layer.module(), layer.module()
        options: dict[str, Any] = {"plan": plan}
        compiled = torch.compile(sparse, backend="pixelfly", options=options), torch.compile(dense)
        for rows in list(made)[: 2 if args.prepare else None]:  # one row, and any other number: two pieces of code
            if layer.flops(rows) > MOST_FLOPS:
                continue
            x = layer.x(rows)
            runs = {"pixelfly": step(compiled[0], sparse.weight, x), "dense": step(compiled[1], dense.weight, x)}
            error = check(layer, plan, runs["pixelfly"], x)
            runs["dense"]()
            if not layer.training:
                runs["onednn"] = onednn(dense, x)
            if not args.prepare:
                yield row(layer, rows, plan, made[rows], runs, args.rounds) | {"error": error}


def row(layer: Layer, rows: int, plan: Plan, own: Plan, runs: Mapping[str, Run], rounds: int) -> dict[str, Any]:
    repeat = {name: repeated(run) for name, run in runs.items()}
    times = interleave({name: run for name, (run, _) in repeat.items()}, rounds, budget_s=1.0)
    seconds = {f"{name}_seconds": times.median(name) / count for name, (_, count) in repeat.items()}
    share = repeat["pixelfly"][1] / repeat["dense"][1]  # of calls in a measurement
    return {
        "in": layer.inputs,
        "out": layer.outputs,
        "dtype": layer.dtype,
        "training": layer.training,
        "rows": rows,
        "decision": decision(plan),
        "own": decision(plan) == decision(own),
        **seconds,
        "speedup": times.speedup("pixelfly", "dense") * share,
        "spread": [share * bound for bound in times.spread("pixelfly", "dense")],
        "predicted": predicted(layer, rows, plan),
    }


def predicted(layer: Layer, rows: int, plan: Plan) -> float:
    """The time model's speed-up of this decision at this number of rows."""
    site = _with_rows(capture(layer.module(), (layer.x(2),)), rows)
    known = {"weight": plan["weight"]}
    speedup = make_plan(site, Config(), training=layer.training, decided=known)["weight"].speedup
    assert speedup is not None, "a sparse site has a predicted speed-up"
    return speedup


# -------------------------------------------------------------------------------------------------------------- report

RUNS = ("pixelfly", "dense", "onednn")
COLUMNS = (
    "in -> out",
    "dtype",
    "rows",
    "own",
    "speed-up",
    "middle half",
    "predicted",
    *(f"{run} us" for run in RUNS),
    "how",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["spread"]
    return [
        f"{row['in']} -> {row['out']}",
        row["dtype"] + (" training" if row["training"] else ""),
        str(row["rows"]),
        "own" if row["own"] else "",
        f"{row['speedup']:.2f}x",
        f"{low:.2f}-{high:.2f}",
        f"{row['predicted']:.2f}x",
        *(f"{row[key] * 1e6:.1f}" if (key := f"{run}_seconds") in row else "" for run in RUNS),
        row["decision"],
    ]


def report(rows: Sequence[Mapping[str, Any]], dense: int, worst: int) -> None:
    ranked = sorted(rows, key=lambda row: row["speedup"])
    print_table(f"the {worst} worst", COLUMNS, map(cells, ranked[:worst]))
    for title, own in (("at numbers of rows that decide so", True), ("at other numbers of rows", False)):
        of = [row for row in ranked if row["own"] == own]
        slower = sum(row["speedup"] < ALLOWED for row in of)
        print(f"{title}: {len(of)} measured, {slower} slower than dense by more than 3%")
    print(f"left dense by the plan: {dense}")
    errors = sorted(row["predicted"] / row["speedup"] for row in rows)
    if errors:
        low, middle, high = (errors[int(share * (len(errors) - 1))] for share in (0.1, 0.5, 0.9))
        print(f"predicted over measured speed-up: median {middle:.2f}, 80% within {low:.2f} and {high:.2f}")


def shape(text: str) -> tuple[int, int]:
    inputs, outputs = map(int, text.split(","))
    return inputs, outputs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="fewer shapes and numbers of rows")
    flags.add_argument("--prepare", action="store_true", help="only compile and check, into Inductor's cache")
    flags.add_argument("--shapes", nargs="+", type=shape, metavar="IN,OUT")
    flags.add_argument("--rows", nargs="+", type=int)
    flags.add_argument("--dtypes", nargs="+", choices=DTYPES, default=dtypes_here())
    flags.add_argument("--modes", nargs="+", choices=("inference", "training"), default=["inference"])
    flags.add_argument("--force", action="store_true", help="also where dense is predicted to be faster")
    flags.add_argument("--rounds", type=int, default=15)
    flags.add_argument("--worst", type=int, default=20, help="lines of the table")
    args = flags.parse_args(argv)
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    args.rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    return args


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    results: list[dict[str, Any]] = []
    dense = 0
    for mode, dtype, (inputs, outputs) in itertools.product(args.modes, args.dtypes, args.shapes):
        layer = Layer(inputs, outputs, dtype, mode == "training")
        made = plans(layer, args.rows, Config(force=args.force))
        dense += sum(not plan.sparse for plan in made.values())
        with torch.set_grad_enabled(layer.training):
            results += measure(layer, made, args)
    if not args.prepare:
        report(results, dense, args.worst)
        append_rows("never_slower", results)
    return results


if __name__ == "__main__":
    main()
