"""Comparing with float64: the tolerance is what eager PyTorch itself is off by in the same dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference relative to the exact result; NaN where they disagree about NaN."""
    exact = exact.double()
    return (torch.linalg.norm(value.double() - exact) / torch.linalg.norm(exact).clamp_min(1e-30)).item()


def assert_as_good_as(ours: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Our error is at most `factor` times eager's, with one rounding of the dtype as the least that is asked for."""
    assert ours.shape == exact.shape and ours.dtype == eager.dtype
    assert torch.isfinite(ours).all(), "NaN or inf where the exact result is finite"
    allowed = factor * max(error(eager, exact), torch.finfo(ours.dtype).eps / 2)
    assert error(ours, exact) <= allowed, f"error {error(ours, exact):.2e}, allowed {allowed:.2e}"
