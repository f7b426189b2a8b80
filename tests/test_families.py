"""The table of families: a family is built small from its defaults and compared; what cannot be built is listed."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import check
from torch import Tensor, nn

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def test_a_family_not_in_the_zoo() -> None:
    row = check("opt")
    assert (row.outcome, row.covered) == ("equal", "100.0%")


def test_what_cannot_be_built_is_listed() -> None:
    assert check("no such family").outcome.startswith("not built")


def test_a_part_of_a_family_is_found_by_its_configuration() -> None:
    row = check("siglip_text_model")
    assert (row.model, row.outcome) == ("SiglipTextModel", "equal")


class Broken(nn.Linear):
    """Dynamo compiles what is behind the break once for each size."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_layers_of_more_sizes_than_dynamo_compiles_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = range(64, 64 + 16 * (torch._dynamo.config.recompile_limit + 4), 16)
    model = nn.Sequential(*(Broken(i, i + 16) for i in sizes))
    monkeypatch.setattr(families, "build", lambda family: (model, {"input": torch.randn(32, 64)}))
    assert check("broken").outcome == "equal"


class Untraceable(nn.Linear):
    """As UDOP writes it: Dynamo alone cannot index with tuples of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.ones(len(x), 2, dtype=torch.bool)
        rows: Any = tuple(torch.arange(len(x)))
        kept[rows, rows] = False
        return super().forward(x) * kept.sum()


def test_what_dynamo_fails_on_by_itself_is_no_failure_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "build", lambda family: (Untraceable(64, 64), {"x": torch.randn(2, 64)}))
    assert "also with backend='eager': TorchRuntimeError" in check("untraceable").outcome
