"""Shared fixtures and the tolerance rule: our error against float64 is at most twice eager's in the same dtype."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from pixelfly_compiler.passes import calibration, cost

# Each run compiles what it tests: Inductor's cache does not see a change of our templates. Within the run it may hit.
_compiled = tempfile.TemporaryDirectory(prefix="pixelfly-tests-", ignore_cleanup_errors=True)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled.name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="of the tests marked gpu, which are passed over where it is not")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: a GPU, or what stands in for one."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return device


def pytest_unconfigure() -> None:
    _compiled.cleanup()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _small_sites_pay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans, of child processes too, are for a CPU whose calls cost nothing: no decision depends on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        calibration.keep(cost.Device(overhead=0.0, packing=0.0))
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code, decisions and compact weights of one test do not reach the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
