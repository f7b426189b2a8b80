"""Allocators: pure functions, so properties over generated budgets."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelfly_compiler.passes.allocate import ALLOCATORS, FILL, Option, Role, allocate, total_kept

ALLOCATOR_NAMES = sorted(ALLOCATORS)


@st.composite
def roles(draw: st.DrawFn, fewest: int = 1) -> list[Role]:
    made = []
    for index in range(draw(st.integers(fewest, 5))):
        dense = draw(st.floats(1.0, 1e12))
        shares = draw(st.lists(st.floats(0.01, 0.99), max_size=6))
        options = tuple(
            Option(share * dense, share, error=(1 - share) * dense, order=draw(st.integers(0, 3))) for share in shares
        )
        made.append(Role(f"r{index}", dense, options, may_be_dense=draw(st.booleans())))
    return made


def every_sum(given_roles: list[Role]) -> list[float]:
    ways = [
        [*(o.kept for o in role.options), *([role.dense] if role.may_be_dense or not role.options else [])]
        for role in given_roles
    ]
    return [sum(way) for way in itertools.product(*ways)]


@settings(max_examples=150, deadline=None)
@given(roles(), st.floats(0.01, 1.0), st.sampled_from(ALLOCATOR_NAMES))
def test_kept_is_within_the_budget_and_fills_it(made: list[Role], budget: float, allocator: str) -> None:
    result = allocate(made, budget, allocator)
    limit = budget * sum(role.dense for role in made)
    sums = every_sum(made)
    assert result.kept == pytest.approx(total_kept(made, result.choices))
    reachable = [total for total in sums if total <= limit]
    if any(FILL * limit * (1 + 1e-5) <= total <= limit * (1 - 1e-5) for total in sums):
        assert FILL * limit * (1 - 1e-5) <= result.kept <= limit * (1 + 1e-9)
        assert result.note is None
    elif reachable and result.kept <= limit * (1 + 1e-9):
        assert result.kept >= max(reachable) * (1 - 1e-4) or result.kept >= FILL * limit * (1 - 1e-5)
        assert (result.note is not None) == (result.kept < FILL * limit)
    elif result.kept > limit * (1 + 1e-9):
        assert result.note is not None
        assert "cannot be met" in result.note


@settings(max_examples=50, deadline=None)
@given(roles(), st.floats(0.01, 1.0), st.sampled_from(ALLOCATOR_NAMES))
def test_a_decision_is_the_same_every_time(made: list[Role], budget: float, allocator: str) -> None:
    assert allocate(made, budget, allocator) == allocate(made, budget, allocator)


@settings(max_examples=50, deadline=None)
@given(roles(), st.floats(0.01, 1.0))
def test_a_role_that_may_not_be_dense_is_not(made: list[Role], budget: float) -> None:
    for allocator in ALLOCATOR_NAMES:
        for role, choice in zip(made, allocate(made, budget, allocator).choices, strict=True):
            assert choice is not None or role.may_be_dense or not role.options


@settings(max_examples=80, deadline=None)
@given(roles(fewest=2), st.floats(0.1, 1.0))
def test_error_is_no_worse_than_proportional(made: list[Role], budget: float) -> None:
    def error(choices: tuple[int | None, ...]) -> float:
        return sum(0 if c is None else r.options[c].error for r, c in zip(made, choices, strict=True))

    best, other = allocate(made, budget, "error"), allocate(made, budget, "proportional")
    if best.note is None and other.note is None:
        scale = sum(role.dense for role in made)
        assert error(best.choices) <= error(other.choices) + 1e-4 * scale


def steps(dense: float, count: int, order: int = 0) -> tuple[Option, ...]:
    return tuple(Option(dense * (i + 1) / count, 1.0, order=order) for i in range(count - 1))


def test_proportional_gives_every_role_its_own_share() -> None:
    made = [Role("mlp", 600.0, steps(600.0, 12)), Role("attention", 400.0, steps(400.0, 12))]
    result = allocate(made, 0.25)
    assert [made[i].options[c].kept for i, c in enumerate(result.choices) if c is not None] == [150.0, 100.0]


def test_what_a_dense_role_takes_is_missing_elsewhere() -> None:
    result = allocate([Role("dense", 100.0), Role("free", 900.0, steps(900.0, 90))], 0.25)
    assert result.choices[0] is None
    assert result.kept == pytest.approx(250.0)


def test_a_budget_that_dense_roles_exceed_is_said_not_raised() -> None:
    result = allocate([Role("dense", 900.0), Role("free", 100.0, steps(100.0, 20))], 0.25)
    assert result.note is not None
    assert "dense sites alone hold 90.0%" in result.note
    assert result.kept == pytest.approx(925.0)


def test_better_order_wins_where_both_fit() -> None:
    options = (Option(25.0, 1.0, order=1), Option(24.5, 1.0, order=0))
    assert allocate([Role("one", 100.0, options)], 0.25).choices == (1,)


def test_each_role_keeps_what_is_nearest_to_its_share_from_below_in_any_order() -> None:
    made = [
        Role("small", 10.0, (Option(2.0, 1.0), Option(1.0, 1.0), Option(4.0, 1.0))),
        Role("large", 990.0, steps(990.0, 4)),
    ]
    assert allocate(made, 0.25).choices == (0, 0)


def test_to_fill_the_budget_as_little_as_possible_changes() -> None:
    ways = ((15.0, 55.0), (10.0, 12.0), (8.0, 30.0))
    made = [Role(name, 100.0, tuple(Option(kept, 1.0) for kept in way)) for name, way in zip("abc", ways, strict=True)]
    assert allocate(made, 0.25).choices == (1, 1, 0), "what the second one wanted stays"


def test_coarse_roles_share_a_budget_that_none_can_fill_alone() -> None:
    made = [Role(name, 100.0, (Option(10.0, 1.0), Option(38.0, 1.0))) for name in "ab"]
    result = allocate(made, 0.25)
    assert sorted(c for c in result.choices if c is not None) == [0, 1]
    assert result.kept == 48.0


def test_allocate_imports_no_torch() -> None:
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('a', sys.argv[1]); m = u.module_from_spec(s)"
    code += "; sys.modules['a'] = m; s.loader.exec_module(m); assert 'torch' not in sys.modules"
    from pixelfly_compiler.passes import allocate as module

    subprocess.run([sys.executable, "-c", code, str(module.__file__)], check=True)
