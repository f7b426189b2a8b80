"""Whole models on a GPU in bf16: a step of training and inference, each contender in a process of its own.

A fresh process has its own peak of memory and compiles from the start; beside it others compile, so that compile times
are upper bounds. Speed-ups are against `torch.compile(mode="max-autotune")`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _common import interleave, timer_of
from models import COMPACT, DENSE, LARGE, SMALL, SPARSE, Case, Runner, check

TUNED, DEFAULT = "max-autotune", "default"
# Mode, contender, mode of torch.compile. Group after group, each for all models: what matters most comes first.
GROUPS = (
    (("train", DENSE, TUNED), ("train", COMPACT, DEFAULT), ("train", SPARSE, DEFAULT), ("train", DENSE, DEFAULT)),
    (("batch", DENSE, TUNED), ("batch", SPARSE, TUNED), ("batch", SPARSE, DEFAULT)),
    (("single", DENSE, TUNED), ("single", SPARSE, TUNED)),
    (("train", COMPACT, TUNED),),
)
BUDGET = 0.25
ROUNDS = 11
PARTS = 8  # of the batch, one after the other, where the fp32 oracle runs


def keys(tiny: bool) -> list[str]:
    """`MODEL/MODE/CONTENDER/COMPILE MODE`."""
    models = SMALL if tiny else LARGE
    return ["/".join((model, *contender)) for group in GROUPS for model in models for contender in group]


def prepare(key: str, device: str, tiny: bool) -> Callable[[], list[dict[str, Any]]]:
    """Compile a contender, by one step."""
    model, mode, name, compiled = key.split("/")
    case = Case(model, "bf16", mode, BUDGET, tiny, device=device)
    workload = case.workload()
    start = time.perf_counter()
    runner = Runner(case, name, workload, None if compiled == DEFAULT else compiled)
    runner()
    wait(device)
    first = time.perf_counter() - start

    def measure() -> list[dict[str, Any]]:
        facts: dict[str, Any] = {"model": model, "mode": mode, "contender": name, "compile_mode": compiled}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = interleave({name: runner}, ROUNDS, warmup=3, timer=timer_of(device))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        seconds = times.median(name)
        items = 1 if mode == "single" else workload.items
        facts |= {"seconds": seconds, "items_per_second": items / seconds, "peak_bytes": peak}
        facts |= {"compile_s": first - seconds, "weights": sum(p.numel() for p in runner.model.parameters())}
        # Last, since steps of training have moved the weights either way, and since it may fail.
        if name == DENSE:
            return [facts]
        try:
            facts["error"] = check(case, runner, max(len(workload.labels) // PARTS, 1))
        except Exception as error:
            facts["wrong"] = f"{type(error).__name__}: {error}"[:1000]
        return [facts]

    return measure


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
