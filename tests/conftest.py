"""Shared fixtures and the tolerance rule: our error against float64 is at most twice eager's in the same dtype."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Compiled code, decisions and compact weights of one test do not reach the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
