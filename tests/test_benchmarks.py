"""The benchmark of quality runs from end to end at a tiny size; nothing is recorded."""

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
    groups = quality.main(["--tiny", "--contenders", "dense", "compact 0.25", "random blocks 0.25"])
    assert list(groups) == ["dense", "compact 0.25", "random blocks 0.25"]
    for rows in groups.values():
        assert [point["step"] for point in rows[0]["curve"]] == [2, 4]
        assert all(math.isfinite(point["loss"]) for point in rows[0]["curve"])
    assert groups["compact 0.25"][0]["elements"] < groups["dense"][0]["elements"]
    assert groups["compact 0.25"][0]["flops"] < 0.3 * groups["dense"][0]["flops"]
    assert "against dense" in capsys.readouterr().out
    assert (recorded.read_bytes() if recorded.exists() else None) == before
