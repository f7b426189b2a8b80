"""What the device reaches at best: bytes per second of a large copy, flop/s of a large matmul in bf16."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from _common import timer_of

ROUNDS = 11


def prepare(key: str, device: str, tiny: bool) -> Callable[[], list[dict[str, Any]]]:
    make = {"bandwidth": _copy, "matmul": _matmul}[key]
    run, amount = make(device, tiny)

    def measure() -> list[dict[str, Any]]:
        timer = timer_of(device)
        for _ in range(3):
            run()
        seconds = statistics.median(timer(run) for _ in range(ROUNDS))
        return [{"ceiling": key, "per_second": amount / seconds, "seconds": seconds}]

    return measure


def _copy(device: str, tiny: bool) -> tuple[Callable[[], Any], float]:
    """Bytes read and bytes written."""
    source = torch.randn(2**20 if tiny else 2**30, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


def _matmul(device: str, tiny: bool) -> tuple[Callable[[], Any], float]:
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3
