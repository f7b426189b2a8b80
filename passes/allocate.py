"""Split the budget: choose one option per role. Pure: numbers in, choices out; no torch, no graph.

A role brings its options (each with what it keeps, its predicted time and its error) and, always possible, dense. An
allocator keeps at most the budget, and at least 95% of it unless the options allow no such sum; then it gets as
close as it can from below, or, where even the least is above the budget, takes the least, and says so in `note`.

To add an allocator, write a function like `proportional` and put it into `ALLOCATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

FILL = 0.95


@dataclass(frozen=True)
class Option:
    """One way to make a role sparse. `kept` is in flops, of all sites of the role together.

    `order` ranks options that suit the budget equally well: lower is better (large blocks before small ones).
    """

    kept: float
    time: float
    error: float = 0.0
    order: int = 0


@dataclass(frozen=True)
class Role:
    """What an allocator knows of a role: its dense cost and its options, none if it must stay dense."""

    name: str
    dense: float
    options: tuple[Option, ...] = ()
    may_be_dense: bool = True


@dataclass(frozen=True)
class Allocation:
    """`choices[i]` is the index of role i's option, None for dense. `note` says why the budget is not met, if so."""

    choices: tuple[int | None, ...]
    kept: float
    limit: float
    note: str | None = None


Choices = list[int | None]


def total_kept(roles: Sequence[Role], choices: Sequence[int | None]) -> float:
    return sum(
        role.dense if choice is None else role.options[choice].kept for role, choice in zip(roles, choices, strict=True)
    )


def proportional(roles: Sequence[Role], limit: float) -> Choices:
    """Each role keeps the share of the budget that it has of the dense compute (the paper's rule of thumb).

    A role whose options are all above (below) its share takes its least (most), and the others share the rest.
    """
    shares = _shares(roles, limit)
    return [
        _closest_below(role, share * role.dense) if role.options else None
        for role, share in zip(roles, shares, strict=True)
    ]


def _shares(roles: Sequence[Role], limit: float) -> list[float]:
    """The share of its dense compute for each role, by water-filling between each role's least and most."""
    dense = np.array([role.dense for role in roles])
    least = np.array([min((o.kept for o in role.options), default=role.dense) for role in roles]) / dense
    most = np.array([max((o.kept for o in role.options), default=role.dense) for role in roles]) / dense
    low, high = 0.0, 1.0
    for _ in range(60):
        level = (low + high) / 2
        if float(np.clip(level, least, most) @ dense) <= limit:
            low = level
        else:
            high = level
    return list(np.clip(low, least, most))


def _closest_below(role: Role, target: float) -> int:
    """The option nearest to the target from below: of the first order that comes within `FILL` of it, if one does."""
    slack = target * (1 + 1e-9)
    below = [index for index, option in enumerate(role.options) if option.kept <= slack]
    if not below:
        return _least_option(role)
    near = [index for index in below if role.options[index].kept >= FILL * target]
    if near:
        return min(near, key=lambda index: (role.options[index].order, -role.options[index].kept))
    return max(below, key=lambda index: (role.options[index].kept, -role.options[index].order))


def error(roles: Sequence[Role], limit: float) -> Choices:
    """Minimise the summed error of the choices, of which dense has none: a multiple-choice knapsack, solved exactly."""
    costs = [[option.error for option in role.options] for role in roles]
    dense = [0.0] * len(roles)
    for floor in (FILL * limit, 0.0):
        choices = _solve(roles, costs, dense, limit, floor)
        if choices is not None:
            return choices
    return _least(roles)


ALLOCATORS: dict[str, Callable[[Sequence[Role], float], Choices]] = {"proportional": proportional, "error": error}


def allocate(roles: Sequence[Role], budget: float, allocator: str = "proportional") -> Allocation:
    """Choose an option or dense for every role within `budget` (a share of the summed dense cost)."""
    limit = budget * sum(role.dense for role in roles)
    fixed = sum(role.dense for role in roles if not role.options)
    least = total_kept(roles, _least(roles))
    if least > limit * (1 + 1e-9):
        return _unreachable(roles, budget, limit, fixed, least, allocator)
    choices = ALLOCATORS[allocator](roles, limit)
    choices = _fill(roles, choices, limit)
    kept = total_kept(roles, choices)
    note = None
    if kept < FILL * limit:
        note = f"keeps {kept / limit:.0%} of the budget: no choice of blocks and ranks comes closer to it from below"
    return Allocation(tuple(choices), kept, limit, note)


def _unreachable(
    roles: Sequence[Role], budget: float, limit: float, fixed: float, least: float, allocator: str
) -> Allocation:
    """Even the least is above the budget. If dense roles are to blame, the others keep the budget's share of theirs."""
    dense = sum(role.dense for role in roles)
    free = [index for index, role in enumerate(roles) if role.options]
    choices: Choices = _least(roles)
    note = f"the budget cannot be met: {least / dense:.1%} is the least that these sites can keep"
    if fixed > 0 and free:
        inner = allocate([roles[index] for index in free], budget, allocator)
        for index, choice in zip(free, inner.choices, strict=True):
            choices[index] = choice
        note = (
            f"the budget cannot be met: dense sites alone hold {fixed / dense:.1%} of the compute; "
            f"the others keep {inner.kept / sum(roles[i].dense for i in free):.1%} of theirs"
        )
    return Allocation(tuple(choices), total_kept(roles, choices), limit, note)


def _least(roles: Sequence[Role]) -> Choices:
    return [_least_option(role) if role.options else None for role in roles]


def _least_option(role: Role) -> int:
    return min(range(len(role.options)), key=lambda index: role.options[index].kept)


def _fill(roles: Sequence[Role], choices: Choices, limit: float) -> Choices:
    """Bring the sum into [FILL * limit, limit] if it can be: one role at a time, else by an exact solution."""
    choices, kept = list(choices), total_kept(roles, choices)
    while kept < FILL * limit:
        step = _smallest_overshoot(roles, choices, limit - kept, limit)
        if step is None:
            break
        role, choice = step
        choices[role] = choice
        kept = total_kept(roles, choices)
    if FILL * limit <= kept <= limit * (1 + 1e-9):
        return choices
    # Distance from what the allocator wanted, so that as little as possible changes.
    wanted = [role.dense if c is None else role.options[c].kept for role, c in zip(roles, choices, strict=True)]
    costs = [[abs(option.kept - want) for option in role.options] for role, want in zip(roles, wanted, strict=True)]
    dense = [role.dense - want for role, want in zip(roles, wanted, strict=True)]
    exact = _solve(roles, costs, dense, limit, FILL * limit)
    if exact is None:
        most = [[-option.kept for option in role.options] for role in roles]
        exact = _solve(roles, most, [-role.dense for role in roles], limit, 0.0)
    return choices if exact is None else exact


def _smallest_overshoot(
    roles: Sequence[Role], choices: Choices, room: float, limit: float
) -> tuple[int, int | None] | None:
    """The upgrade of one role that fits into `room` and lifts its density least; a tie goes to the better order."""
    best: tuple[tuple[float, int], tuple[int, int | None]] | None = None
    for index, (role, choice) in enumerate(zip(roles, choices, strict=True)):
        if choice is None:
            continue
        now = role.options[choice].kept
        for other, option in enumerate(role.options):
            if now < option.kept <= now + room:
                score = (option.kept / role.dense, option.order)
                if best is None or score < best[0]:
                    best = (score, (index, other))
    return None if best is None else best[1]


def _solve(
    roles: Sequence[Role], costs: Sequence[Sequence[float]], dense_costs: Sequence[float], limit: float, floor: float
) -> Choices | None:
    """One choice per role at the least summed cost with floor <= kept <= limit; None if there is none."""
    columns = [(index, option) for index, role in enumerate(roles) for option in _choices(role)]
    cost, kept = np.zeros(len(columns)), np.zeros(len(columns))
    one_each = np.zeros((len(roles), len(columns)))
    for column, (index, option) in enumerate(columns):
        kept[column] = roles[index].dense if option is None else roles[index].options[option].kept
        cost[column] = dense_costs[index] if option is None else costs[index][option]
        one_each[index, column] = 1
    # The solver's tolerance may let a sum slip over the limit by a millionth; then ask for that much less.
    for upper in (1.0, 1 - 3e-6):
        result = milp(
            cost / (float(np.abs(cost).max()) or 1.0),
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(kept / limit, floor / limit, upper)],
        )
        if result.x is None:
            return None
        chosen: Choices = [None] * len(roles)
        for (role, choice), taken in zip(columns, result.x, strict=True):
            if taken > 0.5:
                chosen[role] = choice
        if total_kept(roles, chosen) <= limit * (1 + 1e-9):
            return chosen
    return None


def _choices(role: Role) -> Choices:
    dense: Choices = [None] if role.may_be_dense or not role.options else []
    return [*range(len(role.options)), *dense]
