"""The table of families: a family is built small from its defaults and compared; what cannot be built is listed."""

from __future__ import annotations

import pytest
from families import check

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def test_a_family_not_in_the_zoo() -> None:
    row = check("opt")
    assert (row.outcome, row.covered) == ("equal", "100.0%")


def test_what_cannot_be_built_is_listed() -> None:
    assert check("no such family").outcome.startswith("not built")
