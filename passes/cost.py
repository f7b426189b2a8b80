"""What a site costs: sympy expressions of flops, bytes and parameters, and a roofline model of the time they take.

`Device` holds the constants of the model. For a CPU `calibrate()` measures them once per machine (CPU model, torch
version and number of threads), in about a second, and keeps them in the user's cache folder; nothing is measured on
import. For a GPU they come from its data sheet, and what share of it is reached is an estimate: see `gpu_device`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch

from pixelfly_compiler.kernels.gpus import Gpu, gpu_of
from pixelfly_compiler.kernels.support import kept_elements
from pixelfly_compiler.passes.sites import Site, SiteConfig

M, OUT, IN, KEPT, RANK, SIZE = SYMBOLS = sympy.symbols("rows out in kept rank size", positive=True, integer=True)

DENSE_PARAMS = OUT * IN
SPARSE_PARAMS = KEPT + RANK * (OUT + IN)
DENSE_FLOPS = 2 * M * DENSE_PARAMS
SPARSE_FLOPS = 2 * M * SPARSE_PARAMS
BLOCK_FLOPS = 2 * M * KEPT
LOWRANK_FLOPS = 2 * M * RANK * (OUT + IN)
DENSE_BYTES = SIZE * (DENSE_PARAMS + M * (OUT + IN))
# The low-rank activations (rows, rank) are written once and read once.
SPARSE_BYTES = SIZE * (SPARSE_PARAMS + M * (OUT + IN + 2 * RANK))
# Training projects the weight in every step, and its gradient too; each reads and writes about two dense weights.
PROJECTION_FLOPS = 2 * (2 * OUT * IN * RANK)
PROJECTION_BYTES = 2 * SIZE * 3 * OUT * IN


@cache
def _compiled(expression: sympy.Expr) -> Callable[..., int]:
    return sympy.lambdify(SYMBOLS, expression)


def evaluate(expression: sympy.Expr, site: Site, config: SiteConfig | None = None) -> int:
    """An expression above, for a site and how it is made sparse."""
    kept = site.elements if config is None else kept_of(site, config)
    rank = 0 if config is None else config.rank
    size = getattr(torch, site.dtype).itemsize
    return int(_compiled(expression)(site.rows, site.out_features, site.in_features, kept, rank, size))


def kept_of(site: Site, config: SiteConfig) -> int:
    """Kept elements of the support, without building it."""
    return kept_elements(site.out_features, site.in_features, config.block, config.strides)


def dense_flops(site: Site) -> int:
    return evaluate(DENSE_FLOPS, site)


def sparse_flops(site: Site, config: SiteConfig) -> int:
    return evaluate(SPARSE_FLOPS, site, config)


# ---- time ----


def _rates(float32: float, bfloat16: float, float16: float) -> dict[str, float]:
    return {"float32": float32, "bfloat16": bfloat16, "float16": float16}


@dataclass(frozen=True)
class Device:
    """Constants of the time model, in flop/s, byte/s and seconds. Rates are by dtype, efficiencies by block."""

    name: str = "cpu (defaults)"
    # What torch's own dense matmul reaches (fp32 on AMD: MKL, half of oneDNN), and what oneDNN reaches.
    dense_rate: dict[str, float] = field(default_factory=lambda: _rates(200e9, 850e9, 300e9))
    peak_rate: dict[str, float] = field(default_factory=lambda: _rates(450e9, 850e9, 300e9))
    bandwidth: float = 30e9
    overhead: float = 4e-6
    # Our kernels' share of the peak rate on kept flops; thin matmuls with the low-rank factors reach less.
    block_efficiency: dict[int, float] = field(default_factory=lambda: {16: 0.45, 32: 0.80, 64: 0.87, 128: 0.90})
    lowrank_efficiency: float = 0.70
    lowrank_overhead: float = 0.0  # of the product with v, where it is a kernel that has to be launched
    blocks: tuple[int, ...] = (64, 32, 16)  # block sizes in order of preference


def gpu_device(gpu: Gpu) -> Device:
    """The time model of a GPU. Data sheets give rates; the shares reached are estimates, not measurements.

    Both cuBLAS and our kernels are taken to reach 70% of the sheet on large matmuls. fp32 without tf32 runs outside of
    the tensor cores, where our kernels reach about half of what cuBLAS does.
    """
    fp32 = gpu.tf32_rate if torch.backends.cuda.matmul.allow_tf32 else gpu.fp32_rate
    exact = fp32 == gpu.fp32_rate
    return Device(
        name=f"{gpu.name} ({gpu.target}, data sheet)",
        dense_rate=_rates(0.7 * fp32, 0.7 * gpu.half_rate, 0.7 * gpu.half_rate),
        peak_rate=_rates((0.35 if exact else 0.7) * fp32, 0.7 * gpu.half_rate, 0.7 * gpu.half_rate),
        bandwidth=0.85 * gpu.bandwidth,
        overhead=3e-6,
        block_efficiency={16: 0.1, 32: 0.3, 64: 0.6, 128: 0.75},
        lowrank_efficiency=0.5,
        lowrank_overhead=3e-6,
        blocks=(128, 64, 32),
    )


def _roofline(flop_time: float, byte_time: float, device: Device) -> float:
    return max(flop_time, byte_time) + device.overhead


def dense_time(site: Site, device: Device, training: bool = False) -> float:
    """Predicted seconds of the dense matmul; in training with its two gradients."""
    rate = device.dense_rate.get(site.dtype, device.dense_rate["float32"])
    forward = _roofline(dense_flops(site) / rate, evaluate(DENSE_BYTES, site) / device.bandwidth, device)
    return 3 * forward if training else forward


def sparse_time(site: Site, config: SiteConfig, device: Device, training: bool = False) -> float:
    """Predicted seconds of the sparse matmul; in training with its gradients and the projection of the weight."""
    peak = device.peak_rate.get(site.dtype)
    if peak is None:
        return float("inf")  # no kernel for this dtype: only the reference, which is never faster than dense
    thin_rate = peak * device.lowrank_efficiency
    flop_time = evaluate(BLOCK_FLOPS, site, config) / (peak * device.block_efficiency[config.block])
    flop_time += evaluate(LOWRANK_FLOPS, site, config) / thin_rate
    forward = _roofline(flop_time, evaluate(SPARSE_BYTES, site, config) / device.bandwidth, device)
    forward += device.lowrank_overhead if config.rank else 0.0
    if not training:
        return forward
    projection = evaluate(PROJECTION_FLOPS, site, config) / thin_rate
    return 3 * forward + _roofline(projection, evaluate(PROJECTION_BYTES, site, config) / device.bandwidth, device)


# ---- calibration ----


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
def _calibrated(key: str) -> Device:
    path = cache_folder() / f"device-{key}.json"
    try:
        return _from_json(path.read_text())
    except (OSError, ValueError, TypeError, KeyError):
        device = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(device), indent=1))
        scratch.replace(path)  # atomic: other processes read all of it or nothing
    except OSError:
        pass  # a read-only home costs a second per process, nothing else
    return device


def calibrate(*, again: bool = False) -> Device:
    """The constants of this machine's CPU, from the cache or measured now."""
    key = hashlib.blake2b(json.dumps(machine()).encode(), digest_size=8).hexdigest()
    if again:
        (cache_folder() / f"device-{key}.json").unlink(missing_ok=True)
        _calibrated.cache_clear()
    return _calibrated(key)


def machine() -> dict[str, str]:
    """What a calibration is valid for."""
    return {"cpu": cpu_name(), "torch": torch.__version__, "threads": str(torch.get_num_threads())}


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
    return Device(**values)


def measure(rows: int = 256, width: int = 1024) -> Device:
    """Time torch's dense matmul, oneDNN's, and a copy, on the current threads."""
    from torch.utils._python_dispatch import _disable_current_modes

    defaults = Device()
    with torch.no_grad(), _disable_current_modes():
        dense, peak = {}, {}
        for name in defaults.dense_rate:
            dtype = getattr(torch, name)
            x, w = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
            flops = 2 * rows * width * width
            dense[name] = flops / _seconds(lambda x=x, w=w: torch.nn.functional.linear(x, w))  # type: ignore[misc]
            peak[name] = max(dense[name], flops / _onednn_seconds(x, w))
        source = torch.ones(16 * 2**20)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    threads = torch.get_num_threads()
    return Device(f"cpu ({threads} threads, measured)", dense, peak, bandwidth)


def _onednn_seconds(x: torch.Tensor, w: torch.Tensor) -> float:
    try:
        return _seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    except (RuntimeError, AttributeError):
        return float("inf")


def _seconds(call: Callable[[], object], repeats: int = 7, limit: float = 0.3) -> float:
    """The fastest of a few runs: the others were disturbed."""
    call()
    times: list[float] = []
    while len(times) < repeats and sum(times) < limit:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
