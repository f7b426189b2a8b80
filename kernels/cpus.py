"""What this machine's CPU multiplies with, as far as it decides which kernels pay."""

from __future__ import annotations

import torch


def multiplies_pairs() -> bool:
    """Are there dot products of pairs of bfloat16 (AVX512_BF16)?"""
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_matrix_unit() -> bool:
    """Does a unit multiply whole tiles of bfloat16 (AMX), and does Inductor compile for it, as it is set now?"""
    if not torch.cpu._is_amx_tile_supported():
        return False
    from torch._inductor.cpu_vec_isa import VecAMX, pick_vec_isa

    return isinstance(pick_vec_isa(), VecAMX)


def is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any("GenuineIntel" in line for line in file)
    except OSError:
        return True  # unknown: PyTorch's own kernels, which are made for Intel's processors, are the safe choice
