"""The one configuration: what `torch.compile(..., options={...})` and `plan(...)` take, checked before compiling."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixelfly_compiler.errors import OptionError
from pixelfly_compiler.passes.allocate import ALLOCATORS

if TYPE_CHECKING:
    from pixelfly_compiler.decision import Plan

BASES = ("fixed", "svd")
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Config:
    """What decides the result.

    budget         share of the dense compute of all sites that may be kept, 0 < budget <= 1
    plan           a ready `Plan` (or the path of a saved one) to use instead of making one
    allocator      how the budget is split over the sites: see `passes/allocate.py`
    block_size     16, 32, 64 or 128; None: the largest of 64, 32 and 16 that meets the budget
    lowrank_share  share of a site's kept compute in its low-rank term, 0 <= share < 1; None: a quarter to a third
    basis          "fixed": one orthonormal basis per shape; "svd": the best one for each weight, inference only
    vary_strides   let layers begin at different strides, of which each has one at least where the budget allows it:
                   depth then mixes all blocks, see `kernels/support.py`
    include        globs of parameter names; if given, only weights that match one are made sparse
    exclude        globs of parameter names that stay dense; wins over `include`
    force          make every eligible site sparse, even where dense is predicted to be faster
    """

    budget: float = 0.25
    plan: Plan | None = field(default=None, repr=False)
    allocator: str = "proportional"
    block_size: int | None = None
    lowrank_share: float | None = None
    basis: str = "fixed"
    vary_strides: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        _check_number("budget", self.budget, "a number in (0, 1]", lambda value: 0 < value <= 1)
        _check_choice("allocator", self.allocator, tuple(sorted(ALLOCATORS)))
        _check_choice("block_size", self.block_size, (None, *BLOCK_SIZES))
        if self.lowrank_share is not None:
            _check_number("lowrank_share", self.lowrank_share, "None or a number in [0, 1)", lambda v: 0 <= v < 1)
        _check_choice("basis", self.basis, BASES)
        _check_choice("vary_strides", self.vary_strides, (False, True))
        _check_choice("force", self.force, (False, True))
        object.__setattr__(self, "include", _globs("include", self.include))
        object.__setattr__(self, "exclude", _globs("exclude", self.exclude))

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
        """The config in `options`, and the options that are Inductor's. Anything else is an error."""
        own = {item.name for item in fields(cls)}
        given = {key: value for key, value in (options or {}).items() if key in own}
        others = {key: value for key, value in (options or {}).items() if key not in own}
        unknown = [key for key in others if key not in _inductor_options()]
        if unknown:
            raise OptionError(
                f"unknown option {unknown[0]!r}",
                next_step=f"valid options: {', '.join(sorted(own))}, and those of torch._inductor.list_options()",
            )
        if given.get("plan") is not None:
            clash = [key for key in given if key != "plan"]  # a ready plan leaves them nothing to decide
            if clash:
                raise OptionError(
                    f"option 'plan' already decides {', '.join(repr(key) for key in clash)}",
                    next_step="leave them out, or leave out the plan",
                )
            given["plan"] = _as_plan(given["plan"])
        return cls(**given), others

    def replace(self, **changes: Any) -> Config:
        return replace(self, **changes)

    def excludes(self, names: Sequence[str]) -> str | None:
        """Why the user keeps a weight (with these names) dense; None if they do not."""
        hit = next((glob for glob in self.exclude if _matches(glob, names)), None)
        if hit is not None:
            return f"excluded by {hit!r}"
        if self.include and not any(_matches(glob, names) for glob in self.include):
            return "not in `include`"
        return None

    def why_unmatched(self, names: Collection[str]) -> list[str]:
        """What to tell of the globs that match none of a model's names: a slip, most likely. Not of a part of a weight,
        since another graph may have it.
        """
        globs = (glob for glob in (*self.include, *self.exclude) if not _matches(glob, names))
        return [_why_unmatched(glob, names) for glob in globs if not _matches(_PART.sub("", glob), names)]


_PART = re.compile(r"\[[\d:, ]+\]$")


def _matches(glob: str, names: Collection[str]) -> bool:
    """Is the glob one of these names, which may have brackets where they are of a part of a weight, or does it match
    one?
    """
    return glob in names or any(fnmatchcase(name, glob) for name in names)


def _why_unmatched(glob: str, names: Collection[str]) -> str:
    dotted = re.sub(r"\[(\w+)\]", r".\1", glob)
    close = [dotted] if _matches(dotted, names) else get_close_matches(glob, names, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "print(plan) lists the names"
    return f"{glob!r} matches the name of no weight: {hint}"


def _as_plan(value: Any) -> Plan:
    from pixelfly_compiler.decision import Plan

    if isinstance(value, Plan):
        return value
    if isinstance(value, str | Path):
        return Plan.load(value)
    raise OptionError(f"option 'plan' is {value!r}", next_step="valid: a Plan, or the path of one saved by plan.save()")


def _inductor_options() -> set[str]:
    from torch._inductor import config  # heavy to import, and only needed here

    return set(config.get_config_copy())


def _check_number(name: str, value: object, valid: str, holds: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not holds(value):
        raise OptionError(f"option {name!r} is {value!r}", next_step=f"valid: {valid}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    # `1 == True`, so types are compared as well.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise OptionError(f"option {name!r} is {value!r}", next_step=f"valid: {', '.join(map(repr, choices))}")


def _globs(name: str, value: object) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise OptionError(f"option {name!r} is {value!r}", next_step="valid: a glob of parameter names, or several")
    return tuple(globs)
