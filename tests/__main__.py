"""All checks, one after the other, the tests last: `python tests`. Arguments go to pytest: `python tests -k plan`.

`python tests --torch 2.11 2.13 2.15 -- -k plan` runs the tests on several versions of torch, each in an environment of
its own, `.venv-torch-VERSION`, which stays: 5 GB each for the versions whose wheels contain CUDA. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ("-n", str(min(os.cpu_count() or 1, 4)), "--dist", "worksteal")  # most of the time goes into compiling
TRITON = {"2.11": "3.6", "2.13": "3.7", "2.15": "3.9"}  # torch -> the Triton made for it


def main(argv: Sequence[str]) -> int:
    flags = argparse.ArgumentParser("python tests", description=__doc__, add_help=False)
    flags.add_argument("--torch", nargs="+", choices=TRITON, metavar="VERSION")
    args, pytest = flags.parse_known_args(argv)
    if args.torch:
        failed = [version for version in args.torch if not passes(version, [arg for arg in pytest if arg != "--"])]
        print(*(f"torch {version}: {'FAILED' if version in failed else 'passed'}" for version in args.torch), sep="\n")
        return len(failed)
    checks = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("pytest", *WORKERS, *pytest))
    return next((code for check in checks if (code := run(sys.executable, "-m", *check))), 0)


def passes(version: str, arguments: Sequence[str]) -> bool:
    """Do the tests pass on this version of torch? Its environment is made, or brought up to date, first."""
    folder = ROOT / f".venv-torch-{version}"
    python = str(folder / "bin" / "python")
    wanted = (f"torch=={version}.*", f"triton=={TRITON[version]}.*", "--editable", ".[test]")
    steps = (
        () if folder.exists() else (sys.executable, "-m", "venv", str(folder)),
        (python, "-m", "pip", "install", "--quiet", *wanted),
        (python, "-m", "pytest", *WORKERS, *arguments),
    )
    return not any(step and run(*step) for step in steps)


def run(*command: str) -> int:
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
