"""Benchmarks run from end to end at a tiny size, where nothing is recorded; how that of quality searches rates."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

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
