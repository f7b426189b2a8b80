"""The folder that `emit` writes to: an emission is complete or not there at all, and files of others stay."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pixelfly_compiler.errors import EmitError

REPORT, KERNELS = "report.json", "kernels"
_OURS = re.compile(rf"({KERNELS}/)?(forward|backward)_\d+(_\w+)?\.\w+")  # names that emit gives
_ANOTHER = "choose another folder (out_dir=, --out-dir)"


@contextmanager
def replaced_when_complete(folder: Path) -> Iterator[Path]:
    """A scratch folder to write the report and what it lists to; at the end of the block they take the place of what an
    earlier emission wrote to `folder`. After an error all is as before.
    """
    try:
        (folder / KERNELS).mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".emit-", dir=folder, ignore_cleanup_errors=True)
    except OSError as cause:
        raise EmitError(f"cannot write to {str(folder)!r}: {cause.strerror}", next_step=_ANOTHER) from cause
    with scratch:
        earlier = _written_before(folder)
        (Path(scratch.name) / KERNELS).mkdir()
        yield Path(scratch.name)
        _put_in_place(Path(scratch.name), folder, earlier)


def _put_in_place(scratch: Path, folder: Path, earlier: Sequence[Path]) -> None:
    """A report is there before what it lists, so that a process that ends in between leaves no files of nobody's."""
    for path in earlier:
        path.unlink(missing_ok=True)
    for name in (REPORT, *sorted(_files(scratch) - {REPORT})):
        (scratch / name).replace(folder / name)


def _written_before(folder: Path) -> list[Path]:
    """What an earlier emission says that it wrote, besides its report. Anything else that has such names is refused."""
    report = folder / REPORT
    names: list[str] = []
    try:
        if report.exists():
            written = json.loads(report.read_text())
            names = [*written["wrappers"], *(file for kernel in written["kernels"] for file in kernel["files"])]
        paths = [folder / name for name in names]
        if not all(path.resolve().is_relative_to(folder.resolve()) for path in paths):
            raise ValueError("it names files outside of its folder")
    except (ValueError, KeyError, TypeError) as cause:
        raise EmitError(f"{report} is not what emit wrote", next_step=_ANOTHER) from cause
    foreign = next((name for name in sorted(_files(folder) - {*names}) if _OURS.fullmatch(name)), None)
    if foreign is not None:
        raise EmitError(
            f"{folder / foreign} is in no report of an emission, and might be overwritten",
            next_step=f"{_ANOTHER}, or remove the file",
        )
    return paths


def _files(folder: Path) -> set[str]:
    """The names of the files that are where emit writes."""
    found = (path for part in (folder, folder / KERNELS) for path in part.iterdir() if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}
