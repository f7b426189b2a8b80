"""The GPUs that code can be made for: what limits a kernel, and the rates of the time model.

Rates are those of the makers' data sheets, dense, without structured sparsity, in flop/s and byte/s; nothing here is
measured. A GPU that is not in the table but really there gets its own limits and the rates of the nearest one known.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU. `family` decides how kernels are launched; `shared_memory` is the most that one block may use."""

    target: str  # "cuda:90" or "hip:gfx942", as Triton counts architectures
    name: str
    family: str
    multiprocessors: int
    shared_memory: int
    registers: int  # per multiprocessor
    threads: int  # per multiprocessor
    bandwidth: float
    half_rate: float  # bf16 and fp16 on tensor cores
    tf32_rate: float
    fp32_rate: float
    memory: int = 80 * 2**30

    @property
    def backend(self) -> str:
        return self.target.partition(":")[0]

    @property
    def arch(self) -> int | str:
        """Triton's name of the architecture: 90, or "gfx942"."""
        name = self.target.partition(":")[2]
        return int(name) if self.backend == "cuda" else name

    @property
    def capability(self) -> tuple[int, int]:
        """As `torch.cuda.get_device_capability` has it."""
        return divmod(self.arch, 10) if isinstance(self.arch, int) else (9, 4)

    @property
    def has_tma(self) -> bool:
        """Copies of whole tiles that one thread asks for: on Hopper and later."""
        return self.backend == "cuda" and self.capability >= (9, 0)

    @property
    def warp(self) -> int:
        return 32 if self.backend == "cuda" else 64


KNOWN = {
    gpu.target: gpu
    for gpu in (
        Gpu("cuda:80", "A100 SXM 80 GB", "ampere", 108, 163 << 10, 65536, 2048, 2039e9, 312e12, 156e12, 19.5e12),
        Gpu("cuda:86", "A10", "ampere", 72, 99 << 10, 65536, 1536, 600e9, 125e12, 62.5e12, 31.2e12),
        Gpu("cuda:89", "L40S", "ampere", 142, 99 << 10, 65536, 1536, 864e9, 362e12, 183e12, 91.6e12),
        Gpu("cuda:90", "H100 SXM", "hopper", 132, 227 << 10, 65536, 2048, 3350e9, 989e12, 495e12, 67e12),
        Gpu("cuda:100", "B200", "blackwell", 148, 227 << 10, 65536, 2048, 8000e9, 2250e12, 1125e12, 75e12),
        Gpu("cuda:120", "RTX 5090", "ampere", 170, 99 << 10, 65536, 1536, 1792e9, 209.5e12, 104.8e12, 104.8e12),
        Gpu("hip:gfx942", "MI300X", "cdna", 304, 64 << 10, 65536, 2048, 5300e9, 1307e12, 653e12, 163.4e12),
    )
}


OLDEST = (8, 0)  # compute capability: for older ones Triton 3.7 makes no tensor core code, but FMAs that spill


@lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a torch device, real or virtual."""
    return _described(torch.cuda.get_device_properties(device))


def _described(properties: Any) -> Gpu:
    hip = torch.version.hip is not None or str(getattr(properties, "gcnArchName", "")).startswith("gfx")
    if hip:
        target = f"hip:{properties.gcnArchName.split(':')[0]}"
        nearest = KNOWN.get(target, KNOWN["hip:gfx942"])
    else:
        number = 10 * properties.major + properties.minor
        target = f"cuda:{number}"
        below = [gpu for gpu in KNOWN.values() if gpu.backend == "cuda" and int(gpu.arch) <= number]
        nearest = max(below or [KNOWN["cuda:80"]], key=lambda gpu: int(gpu.arch))
    return replace(
        nearest,
        target=target,
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", nearest.shared_memory),
    )


def why_no_kernels(device: torch.device) -> str | None:
    """Why matmuls on this device stay dense; None if there are kernels."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no kernels for device {device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "kernels for GPUs need triton, which is not installed"
    gpu = gpu_of(device)
    if gpu.backend == "cuda" and gpu.capability < OLDEST:
        has = ".".join(map(str, gpu.capability))
        return f"{gpu.name} has compute capability {has}, and Triton makes tensor core code from 8.0 on"
    return None
