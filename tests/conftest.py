"""Shared fixtures and the tolerance rule: our error against float64 is at most twice eager's in the same dtype."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

# Each run compiles what it tests: Inductor's cache does not see a change of our templates. Within the run it may hit.
_compiled = tempfile.TemporaryDirectory(prefix="pixelfly-tests-", ignore_cleanup_errors=True)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled.name)


def pytest_unconfigure() -> None:
    _compiled.cleanup()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code, decisions and compact weights of one test do not reach the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
