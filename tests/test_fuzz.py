"""Each way to write a matmul, and random modules, the same ones every time; `python tests/fuzz.py` runs others."""

from __future__ import annotations

import pytest
import torch
from fuzz import AROUND, BETWEEN, FORMS, STORED, Case, Layer, check, fuzz

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_once(form: str) -> None:
    """Planned for these sizes, and compiled for any."""
    layers = (Layer(form, 48), Layer(form, 64, "relu"))
    check(Case(layers, twice=True, dtype=torch.float64, dynamic=True, block=16))


@pytest.mark.parametrize(
    "layer",
    [
        *(Layer("linear", 48, between=between) for between in BETWEEN),
        *(Layer("a matrix for each head", 48, stored=stored) for stored in STORED),
        *(Layer("matmul", 48, around=around) for around in AROUND),
    ],
    ids=lambda layer: f"{layer.between}, {layer.stored}, {layer.around}",
)
def test_what_may_be_around_a_form(layer: Layer) -> None:
    check(Case((layer, Layer("matmul", 32)), width=32))


@pytest.mark.parametrize("number", range(5))
def test_random_modules(number: int) -> None:
    fuzz(cases=8, number=number)
