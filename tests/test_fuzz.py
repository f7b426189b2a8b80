"""A hundred random modules, the same ones every time; `python tests/fuzz.py` runs thousands of others."""

from __future__ import annotations

import pytest
import torch
from fuzz import BETWEEN, FORMS, Case, check, fuzz

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_once(form: str) -> None:
    layers = ((form, 48, "nothing"), (form, 64, "relu"))
    check(Case(layers, 64, 2, True, torch.float64, False, 0.5, 16))


def test_what_may_stand_between() -> None:
    for between in BETWEEN:
        check(Case((("linear", 48, between), ("matmul", 32, between)), 32, 2, False, torch.float32, False, 0.5, None))


@pytest.mark.parametrize("number", range(5))
def test_random_modules(number: int) -> None:
    fuzz(cases=14, number=number)
