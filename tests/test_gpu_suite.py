"""The GPU suite's own logic, without a GPU: workers that fail do not take others along, and reports are complete."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.workers import Pool

ROOT = Path(__file__).resolve().parent.parent
WORKER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu.workers import work

def prepare(key):
    if key == "raises":
        raise ValueError("as it should")
    if key == "dies":
        os._exit(3)
    if key == "hangs":
        time.sleep(100)

    def measure():
        begin = time.monotonic()
        time.sleep(0.1)
        return [dict(key=key, begin=begin, end=time.monotonic())]
    return measure

work(prepare, lambda: True)
"""


def run(keys: list[str], log: Path, **options: Any) -> dict[str, dict[str, Any]]:
    given: dict[str, Any] = {"jobs": 3, "deadline": time.monotonic() + 60, "patience": 10.0, **options}
    return dict(Pool([sys.executable, "-c", WORKER], keys, log=log, caches=log.parent, **given).run())


@pytest.mark.parametrize("fresh", [False, True])
def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, fresh: bool) -> None:
    found = run(["a", "raises", "dies", "b", "c"], tmp_path / "log", fresh=fresh)
    assert all(found[key]["rows"][0]["key"] == key for key in "abc")
    assert found["raises"]["error"] == "ValueError: as it should"
    assert "ended with 3" in found["dies"]["error"]


def test_only_one_measures_at_a_time(tmp_path: Path) -> None:
    rows = [answer["rows"][0] for answer in run(list("abcdef"), tmp_path / "log").values()]
    spans = sorted((row["begin"], row["end"]) for row in rows)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_what_hangs_is_given_up_and_what_is_late_not_begun(tmp_path: Path) -> None:
    found = run(["hangs", "a"], tmp_path / "log", jobs=1, patience=3.0)
    assert "no answer" in found["hangs"]["error"] and found["a"]["rows"]
    found = run(["hangs", "a"], tmp_path / "log", jobs=1, deadline=time.monotonic() + 2)
    assert all("not reached" in found[key]["error"] for key in ("hangs", "a"))


def test_layers_begin_with_the_headline_and_none_comes_twice() -> None:
    pytest.importorskip("jinja2")
    from benchmarks.gpu import layer_cases, model_cases

    for keys in (layer_cases.keys(False), model_cases.keys(False)):
        assert len(keys) == len(set(keys))
    assert layer_cases.keys(False)[0] == "4096,4096,4096,0.25,64,ours"
    assert model_cases.keys(False)[0] == "gpt2-medium/train/torch.compile/max-autotune"


def main(tmp_path: Path, *flags: str) -> dict[str, Any]:
    from benchmarks.gpu.__main__ import main

    main(["--device", "cpu", "--scale", "tiny", "--out", str(tmp_path), *flags])
    assert (tmp_path / "gpu.txt").read_text().startswith("when ")
    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert not any(section["errors"] for section in report["sections"].values())
    return report["sections"]


def test_the_suite_runs(tmp_path: Path) -> None:
    sections = main(tmp_path, "--sections", "ceilings", "--minutes", "2")
    assert {row["ceiling"] for row in sections["ceilings"]["rows"]} == {"bandwidth", "matmul"}


@pytest.mark.slow
def test_the_whole_suite_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sections = main(tmp_path, "--minutes", "30", "--jobs", "2", "--sections", "ceilings", "layers", "models")
    assert {row["operation"] for row in sections["layers"]["rows"] if "operation" in row} == {
        "forward",
        "input_grad",
        "weight_grad",
    }
    assert not any("wrong" in row for name in ("layers", "models") for row in sections[name]["rows"])
