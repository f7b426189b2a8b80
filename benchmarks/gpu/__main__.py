"""The GPU suite: correctness, single layers against cuBLAS with their roofline, whole models; in minutes.

    python -m benchmarks.gpu                                      # everything, in under 9 minutes on an H100
    python -m benchmarks.gpu --sections layers models --minutes 20
    python -m benchmarks.gpu --device cpu --scale tiny            # does it run?

Nothing needs to be installed beyond the checkout. Each piece of work runs in a process of its own (see `workers.py`),
an error of one is recorded and the others go on. `OUT/gpu.json` is written anew after every piece, so that a run that
is cut off keeps what it has; the tables are in `OUT/gpu.txt`, too. Time that a section leaves over goes to the next;
what was not reached says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import HERE, machine

from .report import tables
from .workers import Pool, Prepare, work

ROOT = HERE.parent
Answer = tuple[str, dict[str, Any]]


@dataclass
class Suite:
    """A run: its arguments, when it began, and what is known so far."""

    args: argparse.Namespace
    begin: float = field(default_factory=time.monotonic)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return 60.0 * self.args.minutes

    def ends(self) -> dict[str, float]:
        """When each section ends at the latest: the shares of those that run are of all the time."""
        shares = [SECTIONS[name].share for name in self.args.sections]
        sums = itertools.accumulate(share / sum(shares) for share in shares)
        return {name: self.begin + part * self.seconds for name, part in zip(self.args.sections, sums, strict=True)}

    def write(self) -> None:
        path = self.args.out / "gpu.json"
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(self.report, indent=1))
        scratch.replace(path)
        (self.args.out / "gpu.txt").write_text(tables(self.report))

    def run(self) -> None:
        for name, end in self.ends().items():
            found: dict[str, Any] = {"rows": [], "errors": {}}
            self.report["sections"][name] = found
            begin = time.monotonic()
            try:
                for key, answer in SECTIONS[name].run(self, end):
                    found["rows"] += [{"key": key, **row} for row in answer.pop("rows", [])]
                    if answer:
                        found["errors"][key] = answer
                    self._tell(name, key, answer)
                    self.write()
            except Exception as error:
                found["errors"][name] = {"error": f"{type(error).__name__}: {error}"}
            found["seconds"] = time.monotonic() - begin
            self.write()

    def _tell(self, section: str, key: str, answer: dict[str, Any]) -> None:
        left = self.begin + self.seconds - time.monotonic()
        print(f"[{left:4.0f} s left] {section} {key}: {answer.get('error', 'done')}"[:300], flush=True)


# ----------------------------------------------------------------------------------------------------------- sections


def tests(suite: Suite, deadline: float) -> Iterator[Answer]:
    """The GPU part of the test-suite, in several processes where pytest-xdist is there."""
    log = suite.args.out / "gpu-tests.log"
    command = [sys.executable, "-m", "pytest", "tests/test_device.py", "--device", suite.args.device, "-v", "-rfE"]
    command += ["--tb=short", "-p", "no:cacheprovider", "-W", "default", "-o", "addopts=", "--color=no"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(suite.args.jobs)]
    if suite.args.scale == "tiny":
        command += ["-k", "repeat or noticed"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **checkout()}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.terminate()
            code = None
    text = log.read_text(errors="replace")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    row: dict[str, Any] = {
        name: len(re.findall(rf" {name.upper()}\b", text)) for name in ("passed", "failed", "skipped")
    }
    row |= {"failures": failed, "finished": code is not None}
    yield "tests", {"rows": [row], **({} if code == 0 else {"error": "failed" if row["finished"] else "out of time"})}


def checkout() -> dict[str, str]:
    """The environment in which this checkout is imported, also if it is not installed."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def pool(section: str, keys: Callable[[bool], list[str]], jobs: int, patience: float, fresh: bool) -> Any:
    def run(suite: Suite, deadline: float) -> Iterator[Answer]:
        args = suite.args
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", section]
        command += ["--device", args.device, "--scale", args.scale]
        with tempfile.TemporaryDirectory(prefix="pixelfly-gpu-", ignore_cleanup_errors=True) as folder:
            environment = {**checkout(), "TORCHINDUCTOR_COMPILE_THREADS": "4"}
            chosen = [key for key in keys(args.scale == "tiny") if args.keys in key]
            log = args.out / f"gpu-{section}.log"
            work = Pool(
                command, chosen, min(jobs, args.jobs), deadline, patience, log, Path(folder), fresh, environment
            )
            yield from work.run()

    return run


@dataclass(frozen=True)
class Section:
    """What runs until its deadline, its share of the time, and for workers what they prepare."""

    run: Callable[[Suite, float], Iterator[Answer]]
    share: float
    prepare: Callable[[argparse.Namespace], Prepare] | None = None


def _ceiling_keys(tiny: bool) -> list[str]:
    return ["bandwidth", "matmul"]


def _layer_keys(tiny: bool) -> list[str]:
    from . import layer_cases

    return layer_cases.keys(tiny)


def _model_keys(tiny: bool) -> list[str]:
    from . import model_cases

    return model_cases.keys(tiny)


def _prepare_ceiling(args: argparse.Namespace) -> Prepare:
    from . import ceilings

    return lambda key: ceilings.prepare(key, args.device, args.scale == "tiny")


def _prepare_layer(args: argparse.Namespace) -> Prepare:
    from . import layer_cases

    return lambda key: layer_cases.prepare(key, args.device)


def _prepare_model(args: argparse.Namespace) -> Prepare:
    from . import model_cases

    return lambda key: model_cases.prepare(key, args.device, args.scale == "tiny")


SECTIONS = {
    "tests": Section(tests, 0.22),
    "ceilings": Section(pool("ceilings", _ceiling_keys, 1, 60, False), 0.05, _prepare_ceiling),
    "layers": Section(pool("layers", _layer_keys, 6, 120, False), 0.28, _prepare_layer),
    "models": Section(pool("models", _model_keys, 4, 300, True), 0.45, _prepare_model),
}


# ---------------------------------------------------------------------------------------------------------------- main


def is_alive(device: str) -> bool:
    """Can the device still be used by this process?"""
    import torch

    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Device, versions, commit. In a process of its own: this one must not open the GPU."""
    import torch

    code = "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps([p.name, p.total_memory]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    gpu = json.loads(done.stdout) if done.returncode == 0 and args.device == "cuda" else None
    about = {**machine(), "device": args.device, "gpu": gpu, "cuda": torch.version.cuda, "scale": args.scale}
    about["commit"] = args.commit or about["commit"]
    for package in ("triton", "transformers"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = None
    return about


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    flags.add_argument("--minutes", type=float, default=8.5, help="of all sections together")
    flags.add_argument("--keys", default="", help="only the pieces of work whose key contains this")
    flags.add_argument("--jobs", type=int, default=6, help="processes that compile at the same time, at most")
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a stand-in, to try the suite")
    flags.add_argument("--scale", choices=("full", "tiny"), default="full")
    flags.add_argument("--out", type=Path, default=HERE / "results", help="a folder")
    flags.add_argument("--commit", default="", help="what is measured, where git does not say it")
    flags.add_argument("--worker", choices=SECTIONS, help=argparse.SUPPRESS)
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.worker:
        prepare = SECTIONS[args.worker].prepare
        assert prepare is not None
        work(prepare(args), lambda: is_alive(args.device))
        return {}
    args.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(args)
    suite.report = {"about": facts(args), "sections": {}}
    suite.run()
    print(tables(suite.report))
    return suite.report


if __name__ == "__main__":
    main()
