"""Errors: each names what is wrong, where, and the next step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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


class ExportError(PixelflyError):
    """A program that cannot be packaged so that it runs by itself."""


class UnknownSiteError(PlanError, KeyError):
    """A weight name that the plan does not have."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        close = get_close_matches(name, list(known), n=3, cutoff=0.4)
        step = f"did you mean {' or '.join(close)}?" if close else "print(plan) lists the names"
        super().__init__("the plan has no weight of this name", site=name, next_step=step)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message quoted, with its line break escaped


def raised_as_they_are(backend: Callable[P, T]) -> Callable[P, T]:
    """A backend whose errors of ours reach the user: Dynamo hides all but its own in a `BackendCompilerFailed`."""

    @wraps(backend)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return backend(*args, **kwargs)
        except PixelflyError as error:
            raise _as_one_of_dynamo(error) from None

    return run


def _as_one_of_dynamo(error: PixelflyError) -> PixelflyError:
    """The same error, of a class that is Dynamo's too. Its traceback leaves out Dynamo's frames."""
    from torch._dynamo.exc import ShortenTraceback  # heavy to import, and only needed here

    kind = type(error)
    both: type[PixelflyError] = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    same = both.__new__(both, *error.args)
    same.__dict__.update(error.__dict__, first_useful_frame=sys._getframe(1))
    return same.with_traceback(error.__traceback__)
