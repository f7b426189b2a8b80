"""All checks, one after the other, the tests last: `python tests`. Arguments go to pytest: `python tests -k plan`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("pytest", *sys.argv[1:]))


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    for check in CHECKS:
        print("$", *check, flush=True)
        code = subprocess.run([sys.executable, "-m", *check], cwd=root, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
