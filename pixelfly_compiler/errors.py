"""Errors: each names what is wrong, where, and the next step."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PixelflyError(Exception):
    """Base of all errors. `site` is the weight's name where there is one; `next_step` says what to do."""

    def __init__(self, message: str, *, site: str | None = None, next_step: str | None = None) -> None:
        self.site, self.next_step = site, next_step
        where = f"{site}: " if site else ""
        super().__init__(f"{where}{message}" + (f"\n  next step: {next_step}" if next_step else ""))


class OptionError(PixelflyError, ValueError):
    """An option that does not exist, or has a value or type it cannot have."""


class PlanError(PixelflyError):
    """A plan that cannot be made, read or used."""


class PlanMismatchError(PlanError):
    """A plan made for another model or other shapes; `site` is the first that differs."""


class CompactError(PixelflyError):
    """A model that cannot be made compact, or dense again, as it is."""


class EmitError(PixelflyError):
    """Code for a GPU that cannot be emitted here."""


class UnknownSiteError(PlanError, KeyError):
    """A weight name that the plan does not have."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        close = get_close_matches(name, list(known), n=3, cutoff=0.4)
        step = f"did you mean {' or '.join(close)}?" if close else "print(plan) lists the names"
        super().__init__("the plan has no weight of this name", site=name, next_step=step)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message quoted, with its line break escaped
