"""Benchmarks run from end to end at a tiny size, where nothing is recorded; how that of quality searches rates."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_quality(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCHMARKS)
    recorded = BENCHMARKS / "results" / "quality.jsonl"
    before = recorded.read_bytes() if recorded.exists() else None
    quality = importlib.import_module("quality")
    tiny = ["--size", "tiny", "--seeds", "0", "--rates", "1e-3"]
    groups = quality.main([*tiny, "--contenders", "dense", "compact 0.25", "random blocks 0.25"])
    assert list(groups) == ["dense", "compact 0.25", "random blocks 0.25"]
    for rows in groups.values():
        assert [point["step"] for point in rows[0]["curve"]] == [2, 4]
        assert all(math.isfinite(point["loss"]) for point in rows[0]["curve"])
    assert groups["compact 0.25"][0]["elements"] < groups["dense"][0]["elements"]
    assert groups["compact 0.25"][0]["flops"] < 0.3 * groups["dense"][0]["flops"]
    assert "against dense" in capsys.readouterr().out
    assert (recorded.read_bytes() if recorded.exists() else None) == before


def test_learning_rates_are_searched_downhill(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    lowest = importlib.import_module("quality").lowest
    for best in range(6):
        assert lowest(lambda rate: abs(rate - best), range(6)) == best  # noqa: B023
    assert lowest(lambda rate: math.inf if rate > 2 else -rate, range(6)) == 2  # what diverges is never the best
    assert lowest(lambda rate: rate, [3]) == 3


def test_never_slower(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("never_slower")
    recorded: list[object] = []
    monkeypatch.setattr(benchmark, "append_rows", lambda name, rows: recorded.extend(rows))
    rows = benchmark.main(["--force", "--shapes", "64,96", "--rows", "2", "40", "--dtypes", "fp32", "--rounds", "1"])
    assert rows == recorded
    assert [(row["rows"], row["own"]) for row in rows] == [(2, True), (40, True)]
    assert all(row["error"] < 1e-5 and row["speedup"] > 0 and row["predicted"] > 0 for row in rows)
    assert "the 20 worst" in capsys.readouterr().out


def test_what_is_written_of_quality_is_of_all_runs_at_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    quality = importlib.import_module("quality")
    losses = {("dense", 1e-3, 0): 2.0, ("dense", 2e-3, 0): 1.0, ("dense", 2e-3, 1): 3.0, ("compact 0.25", 1e-3, 1): 4.0}
    runs = {
        quality.Run(name, rate, seed, steps, size): {
            "contender": name,
            "rate": rate,
            "seed": seed,
            "curve": [{"loss": loss}],
        }
        for (name, rate, seed), loss in losses.items()
        for size, steps in (("tiny", 4), ("short", 4))
    }
    results = quality.Results(BENCHMARKS / "none", record=False)
    results.rows |= runs
    groups = quality.at_their_best(results, "tiny", 4)
    assert {name: [(row["rate"], row["seed"]) for row in rows] for name, rows in groups.items()} == {
        "dense": [(2e-3, 0), (2e-3, 1)],
        "compact 0.25": [(1e-3, 1)],
    }


def test_low_rank_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    quality = importlib.import_module("quality")
    monkeypatch.setattr(quality, "dtypes_here", lambda: ["fp32", "bf16"])
    size = replace(quality.SIZES["tiny"], dtype="bf16")
    ids = torch.randint(256, (size.batch, size.sequence))
    weight = quality.build("low rank 0.25", size, ids, seed=0).model.lm_head.weight
    assert weight.dtype == torch.float32 and torch.linalg.matrix_rank(weight) < min(weight.shape)
