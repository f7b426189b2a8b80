"""Every example runs from end to end at a tiny size, dense and with the one line."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.parametrize("name", ["train_gpt", "image_mixer"])
def test_training_example_races_dense_against_the_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip({"train_gpt": "transformers", "image_mixer": "sklearn"}[name])
    results = importlib.import_module(name).main(["--steps", "3", "--size", "tiny", "--keep-cache"])
    assert [result.contender.name for result in results] == ["dense", "pixelfly"]
    assert all(math.isfinite(result.score) and result.speed.step_time > 0 for result in results)
    assert results[0].kept == 1.0 and 0 < results[1].kept < 1.0
    assert "kept compute" in capfd.readouterr().out


def test_inference_example_agrees_with_the_oracle() -> None:
    pytest.importorskip("transformers")
    rows = importlib.import_module("inference").main(["--steps", "3", "--size", "tiny", "--budgets", "0.5"])
    assert [row.basis for row in rows] == ["fixed", "svd"]
    assert all(row.mismatch < 1e-4 < row.error for row in rows)


def test_finetune_example_wins_back_what_projection_cost_and_survives_saving() -> None:
    pytest.importorskip("transformers")
    stages = importlib.import_module("finetune_compact").main(["--steps", "8", "--size", "tiny", "--budget", "0.5"])
    dense, projected, tuned, loaded = stages
    assert projected.parameters == tuned.parameters == loaded.parameters < dense.parameters
    assert tuned.loss < projected.loss
    assert loaded.loss == pytest.approx(tuned.loss, abs=1e-4)
