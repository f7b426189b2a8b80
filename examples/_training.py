"""What the training examples share: one contender trained in a fresh process, and the table at the end.

A fresh process per contender gives each one its own peak of memory and, with an empty compile cache, its own compile
time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

DENSE, SPARSE = "dense", "pixelfly"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Contender:
    """A model compiled the usual way, or with the one line."""

    name: str
    budget: float

    def compile(self, model: nn.Module) -> Any:
        if self.name == DENSE:
            return torch.compile(model)
        options: dict[str, Any] = {"budget": self.budget}
        return torch.compile(model, backend="pixelfly", options=options)

    def kept(self, model: nn.Module, *args: Any, **kwargs: Any) -> float:
        """The share of the dense compute of the model's weight matmuls that is kept."""
        if self.name == DENSE:
            return 1.0
        import pixelfly_compiler  # here, so that a dense run does not depend on it

        return float(pixelfly_compiler.plan(model, args, kwargs, budget=self.budget).kept)


@dataclass(frozen=True)
class Training:
    """What all contenders of an example have in common."""

    steps: int
    lr: float
    dtype: torch.dtype
    items_per_step: int
    seed: int

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Speed:
    """Seconds of the first step (which compiles, the step itself taken off) and of the median step after it."""

    compile_time: float
    step_time: float


@dataclass(frozen=True)
class Result:
    """One contender's run; `score` is what the example measures on held-out data."""

    contender: Contender
    speed: Speed
    score: float
    kept: float
    peak_bytes: int


def train(
    name: str,
    model: nn.Module,
    loss_of_batch: Callable[[Any], Tensor],
    batches: Iterator[Any],
    training: Training,
) -> Speed:
    """AdamW with warm-up and cosine decay to 10%."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, fused=True)
    schedule = warmup_and_cosine(optimizer, training)
    times = []
    with progress_bar() as bar:
        task = bar.add_task(name, total=training.steps, note="compiling")
        for batch in itertools.islice(batches, training.steps):
            start = time.perf_counter()
            with training.autocast():
                loss = loss_of_batch(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
            schedule.step()
            bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
    step_time = statistics.median(times[1:] or times)
    return Speed(max(0.0, times[0] - step_time), step_time)


def warmup_and_cosine(optimizer: torch.optim.Optimizer, training: Training) -> torch.optim.lr_scheduler.LambdaLR:
    warmup = max(1, round(WARMUP_SHARE * training.steps))

    def factor(step: int) -> float:
        done = (step - warmup) / max(1, training.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * done)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def progress_bar() -> Progress:
    columns = TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn())


def peak_memory() -> int:
    """This process's peak of resident memory, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child starts at its parent's size on Linux; this one does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parser(description: str, sizes: Iterable[str], lr: float) -> argparse.ArgumentParser:
    """The flags every training example has."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--size", choices=sizes, default="small")
    flags.add_argument("--steps", type=int, help="training steps (default: the size's own)")
    flags.add_argument("--lr", type=float, default=lr)
    flags.add_argument("--budget", type=float, default=0.25)
    flags.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 trains under autocast")
    flags.add_argument("--contenders", nargs="+", choices=[DENSE, SPARSE], default=[DENSE, SPARSE])
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--keep-cache", action="store_true", help="use the compile cache of earlier runs")
    return flags


def race(
    run: Callable[[Contender, Any, Training], Result], args: argparse.Namespace, size: Any, items_per_step: int
) -> list[Result]:
    """`run(contender, size, training)` for each contender, one after the other, each in a new interpreter."""
    training = Training(args.steps or size.steps, args.lr, DTYPES[args.dtype], items_per_step, args.seed)
    contenders = [Contender(name, args.budget) for name in args.contenders]
    return [in_fresh_process(run, contender, size, training, keep_cache=args.keep_cache) for contender in contenders]


def in_fresh_process(function: Callable[..., Result], *args: Any, keep_cache: bool) -> Result:
    """`function(*args)` in a new interpreter; unless `keep_cache`, with an empty compile cache."""
    with contextlib.ExitStack() as stack:
        cache = None if keep_cache else stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        return pool.submit(with_cache, cache, function, args).result()


def with_cache(cache: str | None, function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    return function(*args)


def report(title: str, results: Sequence[Result], items_per_step: int, *, items: str, score: str) -> None:
    """Print the contenders side by side; the last column is the second one's ratio to the first."""
    rows: list[tuple[str, Callable[[Result], float], str]] = [
        (f"{items} per second", lambda r: items_per_step / r.speed.step_time, ",.0f"),
        ("median step (s)", lambda r: r.speed.step_time, ".3f"),
        ("first step, compiles (s)", lambda r: r.speed.compile_time, ".1f"),
        (score, lambda r: r.score, ".3f"),
        ("peak memory (MiB)", lambda r: r.peak_bytes / 2**20, ",.0f"),
        ("kept compute of weight matmuls", lambda r: r.kept, ".1%"),
    ]
    table = Table("", *(r.contender.name for r in results), *(["ratio"] if len(results) == 2 else []))
    for label, value, spec in rows:
        values = [value(result) for result in results]
        ratio = [f"{values[1] / values[0]:.2f}x"] if len(values) == 2 else []
        table.add_row(label, *(format(v, spec) for v in values), *ratio)
    Console().print(title, table, "Step times and rates leave out the first step, which compiles.", sep="\n")
