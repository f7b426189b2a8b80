"""Compiler caches: a new process compiles nothing again, forward or backward, unless what is compiled has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.compiler.config as compiler_config

from pixelfly_compiler import backend

STEP = """
import json, sys, torch
from pathlib import Path
from torch import nn
from torch._dynamo.utils import counters
import pixelfly_compiler

budget, artifacts, loads = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "load"
if loads:
    torch.compiler.load_cache_artifacts(artifacts.read_bytes())
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
options = {"budget": budget, "force": True}
torch.compile(model, backend="pixelfly", options=options)(torch.randn(32, 64)).sum().backward()
if not loads:
    artifacts.write_bytes(torch.compiler.save_cache_artifacts()[0])
caches = {"aot_autograd": "autograd_cache", "inductor": "fxgraph_cache"}
print(json.dumps({f"{name}_{kind}": counters[group][f"{name}_{kind}"]
                  for group, name in caches.items() for kind in ("hit", "miss", "bypass")}))
"""


def step(folder: Path, budget: float, artifacts: str = "save", caches: str = "caches") -> dict[str, int]:
    """What the caches counted in a training step of a fresh interpreter, which saves its artifacts or loads them."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / caches)}
    command = [sys.executable, "-W", "ignore", "-c", STEP, str(budget), str(folder / "artifacts"), artifacts]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.mark.slow
def test_a_new_process_compiles_nothing_again_until_an_option_changes(tmp_path: Path) -> None:
    cold, warm, changed = step(tmp_path, 0.5), step(tmp_path, 0.5), step(tmp_path, 0.25)
    assert cold["fxgraph_cache_miss"] == warm["fxgraph_cache_hit"] == changed["fxgraph_cache_miss"] == 2, "both graphs"
    assert cold["fxgraph_cache_hit"] == warm["fxgraph_cache_miss"] == changed["fxgraph_cache_hit"] == 0
    assert warm["autograd_cache_hit"] == 1


@pytest.mark.slow
def test_saved_artifacts_take_the_place_of_the_caches(tmp_path: Path) -> None:
    step(tmp_path, 0.5)
    elsewhere = step(tmp_path, 0.5, artifacts="load", caches="empty")
    assert elsewhere["fxgraph_cache_hit"] == 2 and elsewhere["autograd_cache_hit"] == 1
    assert elsewhere["fxgraph_cache_miss"] == elsewhere["autograd_cache_miss"] == 0


def test_code_for_a_matrix_unit_is_not_that_for_other_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = set()
    for unit in (True, False):
        monkeypatch.setattr(backend, "has_matrix_unit", lambda unit=unit: unit)
        with backend.cache_tag():
            tags.add(compiler_config.cache_key_tag)
    assert len(tags) == 2
