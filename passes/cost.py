"""What a site costs: sympy expressions of flops, bytes and parameters, and a model of the time they take.

`Device` holds the constants of the model. For a CPU `calibration` measures what dense matmuls take; what ours take is
a model, fitted once. For a GPU they come from its data sheet, and what share of it is reached is an estimate: see
`gpu_device`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import sympy
import torch

from pixelfly_compiler.kernels.gpus import Gpu
from pixelfly_compiler.passes.sites import Site, SiteConfig

M, OUT, IN, KEPT, RANK, SIZE = SYMBOLS = sympy.symbols("rows out in kept rank size", positive=True, integer=True)

DENSE_PARAMS = OUT * IN
SPARSE_PARAMS = KEPT + RANK * (OUT + IN)
DENSE_FLOPS = 2 * M * DENSE_PARAMS
SPARSE_FLOPS = 2 * M * SPARSE_PARAMS
BLOCK_FLOPS = 2 * M * KEPT
LOWRANK_FLOPS = 2 * M * RANK * (OUT + IN)
# The low-rank activations (rows, rank) are written once and read once.
SPARSE_BYTES = SIZE * (SPARSE_PARAMS + M * (OUT + IN + 2 * RANK))
# Training projects the weight in every step, and its gradient too, in fp32; each reads and writes about two dense
# weights, and what it computes does not hide that.
PROJECTION_FLOPS = 2 * (2 * OUT * IN * RANK)
PROJECTION_BYTES = 2 * 4 * 3 * OUT * IN


@cache
def _compiled(expression: sympy.Expr) -> Callable[..., int]:
    return sympy.lambdify(SYMBOLS, expression)


def evaluate(expression: sympy.Expr, site: Site, config: SiteConfig | None = None) -> int:
    """An expression above, for a site and how it is made sparse."""
    kept = site.elements if config is None else config.kept_blocks(site.out_features, site.in_features)
    rank = 0 if config is None else config.rank
    size = getattr(torch, site.dtype).itemsize
    return int(_compiled(expression)(site.rows, site.out_features, site.in_features, kept, rank, size))


def dense_flops(site: Site) -> int:
    return evaluate(DENSE_FLOPS, site)


# ---- time ----

DTYPES = ("float32", "bfloat16", "float16")
# The numbers of rows, and the widths of square weights, at which a device says what dense takes.
DENSE_ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
DENSE_WIDTHS = (64, 256, 1024, 4096, 16384)
Grid = tuple[tuple[float, ...], ...]  # seconds, by DENSE_ROWS and DENSE_WIDTHS


def _rates(float32: float, bfloat16: float, float16: float) -> dict[str, float]:
    return dict(zip(DTYPES, (float32, bfloat16, float16), strict=True))


def roofline(rates: dict[str, float], bandwidth: float, overhead: float) -> dict[str, Grid]:
    """What dense takes where it reaches these flop/s, or else this byte/s, and `overhead` seconds for a call."""

    def seconds(dtype: str, rows: int, width: int) -> float:
        size = getattr(torch, dtype).itemsize * (width * width + 2 * rows * width)
        return max(2 * rows * width * width / rates[dtype], size / bandwidth) + overhead

    return {
        dtype: tuple(tuple(seconds(dtype, rows, width) for width in DENSE_WIDTHS) for rows in DENSE_ROWS)
        for dtype in rates
    }


@dataclass(frozen=True)
class Device:
    """Constants of the time model, in flop/s, byte/s and seconds. Rates are by dtype, efficiencies by block.

    The defaults of what our kernels do were fitted to 176 measurements by `benchmarks/never_slower.py`, on Zen 5 with
    AVX-512, in fp32 and bf16, for 1 to 4096 rows, and rounded to the slower side. What the projection takes in a step
    of training was fitted to 112 on Zen 4, by its `--modes training --force`, for 1 to 2048 rows.
    """

    name: str = "cpu (defaults)"
    dense: dict[str, Grid] = field(default_factory=lambda: roofline(_rates(200e9, 850e9, 55e9), 60e9, 2e-6))
    # The most that our kernels could reach, and the share of it that they do, on kept blocks and in thin matmuls with
    # the low-rank factors; what they do in the dot products that few rows take.
    rate: dict[str, float] = field(default_factory=lambda: _rates(450e9, 900e9, 450e9))
    block_efficiency: dict[int, float] = field(default_factory=lambda: {16: 0.62, 32: 0.90, 64: 0.97, 128: 1.0})
    lowrank_efficiency: float = 0.85
    few_rows: int = 32
    few_rows_rate: dict[str, float] = field(default_factory=lambda: _rates(180e9, 360e9, 180e9))
    bandwidth: float = 60e9
    packing: float = 42e-12  # seconds per byte of compact weight, which is put into another order for more rows
    overhead: float = 6e-6  # of a call: looking up the compact weight, checks of its tensors, waking threads
    projection_rate: float = 450e9  # of P and its adjoint, in fp32
    projection_calls: float = 24.0  # how many overheads P and its adjoint take beside their flops and bytes
    lowrank_overhead: float = 0.0  # of the product with v, where it is a kernel that has to be launched
    blocks: tuple[int, ...] = (64, 32, 16)  # block sizes in order of preference


def gpu_device(gpu: Gpu) -> Device:
    """The time model of a GPU. Data sheets give rates; the shares reached are estimates, not measurements.

    Both cuBLAS and our kernels are taken to reach 70% of the sheet on large matmuls. fp32 without tf32 runs outside of
    the tensor cores, where our kernels reach about half of what cuBLAS does.
    """
    fp32 = gpu.tf32_rate if torch.backends.cuda.matmul.allow_tf32 else gpu.fp32_rate
    exact = fp32 == gpu.fp32_rate
    bandwidth = 0.85 * gpu.bandwidth
    return Device(
        name=f"{gpu.name} ({gpu.target}, data sheet)",
        dense=roofline(_rates(0.7 * fp32, 0.7 * gpu.half_rate, 0.7 * gpu.half_rate), bandwidth, 3e-6),
        rate=_rates((0.35 if exact else 0.7) * fp32, 0.7 * gpu.half_rate, 0.7 * gpu.half_rate),
        block_efficiency={16: 0.1, 32: 0.3, 64: 0.6, 128: 0.75},
        lowrank_efficiency=0.5,
        few_rows=0,
        bandwidth=bandwidth,
        packing=0.0,
        overhead=3e-6,
        # In tf32, three products for one; see `projection_launch`.
        projection_rate=0.35 * (gpu.tf32_rate / 3 if gpu.backend == "cuda" else gpu.fp32_rate),
        projection_calls=6.0,  # three launches each way; the process runs ahead of them
        lowrank_overhead=3e-6,
        blocks=(128, 64, 32),
    )


def _groups(site: Site) -> int:
    """How many matrices of a weight of several are met by rows, at most."""
    return min(site.matrices, max(site.rows, 1))


def _one_of(site: Site) -> Site:
    """One of several matrices with an even share of the rows: both dense and sparse, they run one after the other."""
    return replace(site, matrices=1, rows=-(-site.rows // _groups(site)))


def dense_time(site: Site, device: Device, training: bool = False) -> float:
    """Predicted seconds of the dense matmul; in training with its two gradients."""
    if site.matrices > 1:
        return _groups(site) * dense_time(_one_of(site), device, training)
    grid = device.dense.get(site.dtype, device.dense["float32"])
    forward = _from_grid(grid, max(site.rows, 1), math.sqrt(max(site.elements, 1)))
    return 3 * forward if training else forward


def _from_grid(grid: Grid, rows: float, width: float) -> float:
    """Between the points of a grid logarithms are linear; beyond it time grows as the flops do."""
    scale = max(rows / DENSE_ROWS[-1], 1.0) * max(width / DENSE_WIDTHS[-1], 1.0) ** 2
    by_rows = [np.interp(math.log(width), np.log(DENSE_WIDTHS), np.log(line)) for line in grid]
    return scale * math.exp(np.interp(math.log(rows), np.log(DENSE_ROWS), by_rows))


def sparse_time(site: Site, config: SiteConfig, device: Device, training: bool = False) -> float:
    """Predicted seconds of the sparse matmul; in training with its gradients and the projection of the weight."""
    if device.rate.get(site.dtype) is None:
        return float("inf")  # no kernel for this dtype: only the reference, which is never faster than dense
    forward = _groups(site) * _forward_time(_one_of(site), config, device)
    if not training:
        return forward
    return 3 * forward + (_projection_time(site, config, device) if site.trained else 0.0)


def _forward_time(site: Site, config: SiteConfig, device: Device) -> float:
    """Of one matrix."""
    few = site.rows <= device.few_rows
    if few:
        compute = evaluate(SPARSE_FLOPS, site, config) / device.few_rows_rate[site.dtype]
    else:
        rate = device.rate[site.dtype]
        compute = evaluate(BLOCK_FLOPS, site, config) / (rate * device.block_efficiency[config.block])
        compute += evaluate(LOWRANK_FLOPS, site, config) / (rate * device.lowrank_efficiency)
    time = max(compute, evaluate(SPARSE_BYTES, site, config) / device.bandwidth) + device.overhead
    time += 0.0 if few else device.packing * evaluate(SIZE * SPARSE_PARAMS, site, config)
    return time + (device.lowrank_overhead if config.rank else 0.0)


def _projection_time(site: Site, config: SiteConfig, device: Device) -> float:
    """Of P and its adjoint, in a step of training: of all matrices, whichever the rows meet."""
    compute = evaluate(PROJECTION_FLOPS, site, config) / device.projection_rate
    memory = evaluate(PROJECTION_BYTES, site, config) / device.bandwidth
    return site.matrices * (compute + memory) + device.projection_calls * device.overhead
