"""What the benchmarks share: paired timing, machine facts, memory, result rows, tables.

Ratios are within one run: in every round each contender runs once, in an order that rotates, and the ratio of two
contenders is the median over rounds of their times' ratio, so that a machine that slows down slows both.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLUSH_BYTES = 128 * 2**20  # beyond any last-level cache we meet


@dataclass(frozen=True)
class Times:
    """Seconds per round for each contender; every contender has a time for every round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, base: str) -> float:
        """How many times faster `name` is than `base`."""
        return statistics.median(self._ratios(name, base))

    def spread(self, name: str, base: str) -> tuple[float, float]:
        """The lowest and highest of the middle half of the rounds' speed-ups."""
        ratios = sorted(self._ratios(name, base))
        quarter = len(ratios) // 4
        return ratios[quarter], ratios[-1 - quarter]

    def _ratios(self, name: str, base: str) -> list[float]:
        return [b / n for n, b in zip(self.seconds[name], self.seconds[base], strict=True)]


def dtypes_here() -> list[str]:
    """Those of `DTYPES` in which dense matmuls are a fair rival on this processor.

    Without AVX-512 oneDNN has no bf16, and PyTorch's own takes up to hundreds of times as long as fp32.
    """
    return [name for name in DTYPES if name != "bf16" or torch.ops.mkldnn._is_mkldnn_bf16_supported()]


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    flush: bool = False,
    budget_s: float = float("inf"),
    timer: Callable[[Callable[[], Any]], float] | None = None,
    device: str = "cpu",
) -> Times:
    """Time every contender once per round. `flush` empties the caches first, as the rest of a model would.

    Stops early, after three rounds at least, once `budget_s` seconds are spent. `timer` gives the seconds of one call.
    """
    timer = timer or host_seconds
    for run in contenders.values():
        for _ in range(warmup):
            run()
    cold = torch.empty(FLUSH_BYTES // 4, device=device) if flush else None
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    gc.collect()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget_s:
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            if cold is not None:
                cold.fill_(done)
            seconds[name].append(timer(contenders[name]))
    return Times(seconds)


def host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_seconds(run: Callable[[], Any]) -> float:
    """Seconds that a GPU is busy with the call, or waits for the host to hand it the call's work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timer_of(device: str) -> Callable[[Callable[[], Any]], float]:
    return device_seconds if device == "cuda" else host_seconds


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, Frobenius, in float64. NaN if anything is NaN."""
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def machine() -> dict[str, Any]:
    """What a row must say to be compared later."""
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """Model name and family: cloud machines hide the name's number, the family still tells the generation."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    pairs = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    return f"{fields.get('model name', platform.machine())} family {fields.get('cpu family', '?')}"


def commit() -> str:
    """The checked-out commit, with + if tracked files differ from it; empty outside a checkout."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def append_rows(benchmark: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Add one JSON line per row, with the machine's facts, to results/<benchmark>.jsonl."""
    path = HERE / "results" / f"{benchmark}.jsonl"
    path.parent.mkdir(exist_ok=True)
    facts = machine()
    with path.open("a") as file:
        file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)
    return path


def load_example(name: str) -> ModuleType:
    """A module of examples/, which is no package."""
    folder = str(HERE.parent / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def peak_memory() -> int:
    """This process's peak of resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child starts at its parent's size on Linux; this one does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> bool:
    """Let the peak start again from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def run_child(script: str, args: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Run `script` in a fresh interpreter; its last line of output is a JSON object."""
    command = [sys.executable, script, *args]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    if done.returncode:
        return {"child_error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(title, table, sep="\n")
