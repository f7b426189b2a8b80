"""What this machine's CPU takes for dense matmuls, measured once and kept in the user's cache folder.

Dense is measured, since libraries differ by far more than a model could know: fp32 here by a factor of two between MKL
and oneDNN, few rows, half precision, the overhead of a call. Our own kernels are not: they are compiled for each
site, so that to measure them costs a minute of C++, and they all do the same at a share of the processor's peak
that hardly depends on the machine. That peak is oneDNN's rate in fp32; our bf16 kernels reach twice of it where the
processor multiplies pairs, and where it has a matrix unit a share of the library's own rate: what both do there hangs
on memory. What a call of ours takes beside its kernel, Python for the most part, grows with what torch's smallest
product takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pixelfly_compiler.kernels.cpus import has_matrix_unit, multiplies_pairs
from pixelfly_compiler.kernels.gpus import gpu_of
from pixelfly_compiler.passes.cost import DENSE_ROWS, DENSE_WIDTHS, DTYPES, Device, Grid, gpu_device

log = logging.getLogger("pixelfly_compiler")

# Larger ones are not measured but told from the largest that are.
MEASURED_PRODUCTS = 2**30
MEASURED_WIDTH = 4096
SMALL_PRODUCT = 1e-3  # seconds: more than any CPU takes for one of 16 rows, 256 wide
SHARE_OF_UNIT = 0.5  # of the rate at which the library's bf16 products run on a matrix unit
SHARE_OF_DOTS = 0.4  # of the peak, in the dot products that few rows take
OVERHEAD_CALLS = 3  # what a call of ours takes beside its kernel, in calls of torch's smallest product


def device_for(kind: str) -> Device:
    """The device model for sites on a GPU; anywhere else that of the CPU (calibrated, from the cache if it can)."""
    device = torch.device(kind)
    return gpu_device(gpu_of(device)) if device.type == "cuda" else _agreed(calibrate())


_agreements: WeakKeyDictionary[Any, Device] = WeakKeyDictionary()


def _agreed(device: Device) -> Device:
    """The constants of the first process to come here: all ranks make the same plan, whatever each has measured."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return device
    store = torch.distributed.distributed_c10d._get_default_store()
    if store not in _agreements:
        text = store.compare_set("pixelfly_device", "", json.dumps(asdict(device)))
        _agreements[store] = _from_json(text.decode())
    return _agreements[store]


@lru_cache(maxsize=1)
def _calibrated(path: Path) -> Device:
    try:
        return _from_json(path.read_text())
    except (OSError, ValueError, TypeError, KeyError):
        device = measure()
    if _is_disturbed(device):
        log.warning(
            "this machine was too busy to measure what dense matmuls take on its CPU: what is predicted to be faster "
            "may not be. The next process measures again, as does `pixelfly calibrate`."
        )
        return device
    with contextlib.suppress(OSError):  # a read-only home costs a second per process, nothing else
        keep(device)
    return device


def keep(device: Device) -> None:
    """Write what this machine's CPU was measured to do where later processes look for it."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(device), indent=1))
    scratch.replace(path)  # atomic: other processes read all of it or nothing


def calibrate(*, again: bool = False) -> Device:
    """The constants of this machine's CPU, from the cache or measured now."""
    path = calibration_file()
    if again:
        path.unlink(missing_ok=True)
        _calibrated.cache_clear()
    return _calibrated(path)


def calibration_file() -> Path:
    key = hashlib.blake2b(json.dumps(machine()).encode(), digest_size=8).hexdigest()
    return cache_folder() / f"device-{key}.json"


def machine() -> dict[str, str]:
    """What a calibration is valid for."""
    return {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "model": Device().name + repr((DENSE_ROWS, DENSE_WIDTHS, OVERHEAD_CALLS, SHARE_OF_UNIT, SHARE_OF_DOTS)),
    }


@lru_cache(maxsize=1)
def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "cpu family", "stepping", "flags")
        return " ".join(next((line for line in lines if line.startswith(key)), "") for key in wanted)
    except OSError:
        return platform.processor() or platform.machine()


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixelfly"


def _from_json(text: str) -> Device:
    values: dict[str, Any] = json.loads(text)
    values["blocks"] = tuple(values["blocks"])
    values["block_efficiency"] = {int(block): share for block, share in values["block_efficiency"].items()}
    values["dense"] = {dtype: tuple(map(tuple, grid)) for dtype, grid in values["dense"].items()}
    return Device(**values)


def _is_disturbed(device: Device) -> bool:
    """Did the smallest products take milliseconds, as they do where other processes keep threads waiting?"""
    small = [seconds for line in device.dense["float32"][:3] for seconds in line[:2]]  # up to 16 rows, 256 wide
    return max(small) > SMALL_PRODUCT


def measure() -> Device:
    """Time torch's dense matmul at many sizes, oneDNN's at one, and a copy, on the current threads.

    A disturbed measurement is made once more, after a second.
    """
    device = _measure()
    if _is_disturbed(device):
        time.sleep(1.0)
        device = _measure()
    return device


def _measure() -> Device:
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.no_grad(), _disable_current_modes():
        dense = {name: _dense_grid(getattr(torch, name)) for name in DTYPES}
        source = torch.ones(16 * 2**20)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
        rate = _peak_rate(dense["float32"])
    name = f"cpu ({torch.get_num_threads()} threads, measured)"
    overhead = max(Device.overhead, OVERHEAD_CALLS * dense["float32"][0][0])
    rates = _kernel_rates(rate, _best_rate(dense["bfloat16"]))
    few_rows = _few_rows_rates(rates)
    return Device(
        name, dense, rates, few_rows_rate=few_rows, bandwidth=bandwidth, overhead=overhead, projection_rate=rate
    )


def _dense_grid(dtype: torch.dtype) -> Grid:
    """Seconds of a dense layer as Inductor calls it. Rows beyond what is measured come at the best rate seen."""
    seconds: dict[tuple[int, int], float] = {}
    best_rate = 0.0
    for width in DENSE_WIDTHS:
        side = min(width, MEASURED_WIDTH)
        w, bias = torch.ones(side, side, dtype=dtype), torch.ones(side, dtype=dtype)
        for rows in DENSE_ROWS:
            flops = 2 * rows * width**2
            if width > MEASURED_WIDTH:
                seconds[rows, width] = 16 * seconds[rows, width // 4]
            elif flops <= 2 * MEASURED_PRODUCTS:
                seconds[rows, width] = _dense_seconds(torch.ones(rows, width, dtype=dtype), w, bias)
                best_rate = max(best_rate, flops / seconds[rows, width])
            else:
                seconds[rows, width] = seconds[rows // 4, width] + 0.75 * flops / best_rate
    return tuple(tuple(seconds[rows, width] for width in DENSE_WIDTHS) for rows in DENSE_ROWS)


def _dense_seconds(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> float:
    out = x.new_empty(len(x), len(w))
    return _seconds(lambda: torch.addmm(bias, x, w.t(), out=out))


def _peak_rate(dense: Grid, rows: int = 256, width: int = 1024) -> float:
    """flop/s of the better of torch's and oneDNN's product in fp32."""
    x, w = torch.ones(rows, width), torch.ones(width, width)
    ours = dense[DENSE_ROWS.index(rows)][DENSE_WIDTHS.index(width)]
    try:
        other = _seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    except (RuntimeError, AttributeError):
        other = ours
    return 2 * rows * width * width / min(ours, other)


def _best_rate(dense: Grid) -> float:
    """flop/s of the products that run best."""
    return max(
        2 * rows * width * width / seconds
        for rows, line in zip(DENSE_ROWS, dense, strict=True)
        for width, seconds in zip(DENSE_WIDTHS, line, strict=True)
    )


def _kernel_rates(float32: float, dense_bfloat16: float) -> dict[str, float]:
    """The peak of our kernels: bf16 on the matrix unit or in pairs; what is widened runs as fp32 does."""
    pairs = 2 * float32 if multiplies_pairs() else float32
    bfloat16 = SHARE_OF_UNIT * dense_bfloat16 if has_matrix_unit() else pairs
    return {"float32": float32, "bfloat16": bfloat16, "float16": float32}


def _few_rows_rates(peak: dict[str, float]) -> dict[str, float]:
    """What of it few rows reach: the unit's tiles, partly empty, as many flop/s as fp32 does with many rows."""
    dots = {dtype: SHARE_OF_DOTS * rate for dtype, rate in peak.items()}
    return dots | {"bfloat16": peak["float32"]} if has_matrix_unit() else dots


def _seconds(call: Callable[[], object], repeats: int = 9, limit: float = 0.1) -> float:
    """The fastest of a few runs, two at least: the others were disturbed."""
    call()
    times: list[float] = []
    while len(times) < 2 or (len(times) < repeats and sum(times) < limit):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
