"""Project a trained model once and see what each budget costs in quality and gives in speed.

    python examples/inference.py

Trains a small dense GPT-2 on the standard library's source, then compiles it for inference at several budgets, with the
fixed basis and with the best one (`basis="svd"`), and checks each against `project_`, which puts P(W) in place of W.
One-shot projection is lossy: training with the one line (see train_gpt.py) is how a model gets good at its budget.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _training import DENSE, Contender, Training, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_gpt import SIZES, batches, gpt, standard_library

import pixelfly_compiler

BASES = ("fixed", "svd")
ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """One projected model: logits against the dense model's (`error`) and the eager projected model's (`mismatch`)."""

    budget: float
    basis: str
    kept: float
    loss: float
    error: float
    mismatch: float
    speedup: float


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def interleaved(first: Callable[[], Any], second: Callable[[], Any]) -> float:
    """How many times faster `second` is: the median over rounds in which both run, one right after the other."""
    ratios = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor, budget: float, basis: str) -> Row:
    """Compile, check and time the model projected at one budget onto one basis."""
    torch._dynamo.reset()  # every row compiles the same forward: else the later ones meet Dynamo's recompile limit
    plan = pixelfly_compiler.plan(model, (ids,), {"labels": ids}, budget=budget, basis=basis)
    oracle = copy.deepcopy(model)
    pixelfly_compiler.project_(oracle, plan)
    options: dict[str, Any] = {"plan": plan}
    run_dense = functools.partial(torch.compile(model), ids, labels=ids)
    run_sparse = functools.partial(torch.compile(model, backend="pixelfly", options=options), ids, labels=ids)
    dense, sparse = run_dense(), run_sparse()
    return Row(
        budget=budget,
        basis=basis,
        kept=plan.kept,
        loss=float(sparse.loss),
        error=relative_error(sparse.logits, dense.logits),
        mismatch=relative_error(sparse.logits, oracle(ids, labels=ids).logits),
        speedup=interleaved(run_dense, run_sparse),
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--size", choices=SIZES, default="small")
    flags.add_argument("--steps", type=int, default=60, help="training steps of the dense model")
    flags.add_argument("--lr", type=float, default=3e-3)
    flags.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.125])
    flags.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    args = flags.parse_args(argv)
    size = SIZES[args.size]

    torch.manual_seed(0)
    held_in, held_out = standard_library()
    model = gpt(size)
    compiled = Contender(DENSE, 1.0).compile(model)
    training = Training(args.steps, args.lr, torch.float32, size.batch * size.sequence, seed=0)
    train(DENSE, model, lambda ids: compiled(ids, labels=ids).loss, batches(held_in, size, seed=0), training)

    ids = next(batches(held_out, size, seed=1234))
    table = Table("budget", "basis", "kept", "loss", "logits error", "against project_", "speed-up")
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    table.add_row("dense", "", "100.0%", f"{loss:.3f}", "", "", "1.00x")
    results = [measure(model.eval(), ids, budget, basis) for budget in args.budgets for basis in args.bases]
    for row in results:
        cells = f"{row.kept:.1%}", f"{row.loss:.3f}", f"{row.error:.1%}", f"{row.mismatch:.0e}", f"{row.speedup:.2f}x"
        table.add_row(f"{row.budget:.1%}", row.basis, *cells)
    Console().print(f"One-shot projection, {size.batch} x {size.sequence} held-out bytes, fp32", table, sep="\n")
    return results


if __name__ == "__main__":
    main()
