"""The GPU suite, `python -m benchmarks.gpu`. The benchmarks that it builds on are scripts beside this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
