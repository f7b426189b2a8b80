"""Work in processes of its own: several prepare at once, one at a time measures, and none takes the others with it.

    parent                        worker
      {"prepare": key}      -->     builds and compiles
                            <--   {"ready": key}
      {"measure": key}      -->     measures, while all others are stopped
                            <--   {"rows": [...]} or {"error": "..."}

An illegal access to memory leaves a process without its GPU, and a compiler may hang: then the worker is replaced, the
error recorded under its key, and the rest goes on.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prepare = Callable[[str], Callable[[], list[dict[str, Any]]]]
MARK = "@pixelfly "  # before a message, to tell it from what libraries print


# ------------------------------------------------------------------------------------------------------------- worker


def work(prepare: Prepare, is_alive: Callable[[], bool]) -> None:
    """Serve one parent on stdin and stdout until it hangs up, or until the device is lost (`is_alive`)."""
    for line in sys.stdin:
        key = json.loads(line)["prepare"]
        try:
            measure = prepare(key)
            _say({"ready": key})
            if not sys.stdin.readline():
                return
            _say({"rows": measure()})
        except Exception as error:
            text = "".join(traceback.format_exception(error, limit=-6))
            _say({"error": f"{type(error).__name__}: {error}"[:2000], "traceback": text[-4000:]})
            if not is_alive():
                sys.exit("the device is lost")


def _say(message: Mapping[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)


# ------------------------------------------------------------------------------------------------------------- parent


@dataclass(eq=False)
class Worker:
    """A process, the key it is at, and since when."""

    process: subprocess.Popen[str]
    key: str = ""
    since: float = 0.0
    is_ready: bool = False

    def tell(self, message: Mapping[str, str]) -> None:
        self.since = time.monotonic()
        with suppress(BrokenPipeError):  # it is gone: what it leaves on stdout says so
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """With the compilers that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


@dataclass
class Pool:
    """Runs all keys, in this order, with `jobs` workers; nothing goes on after `deadline`, a `time.monotonic`.

    `patience`: seconds that a worker may take to prepare or to measure. `fresh`: a new process for every key. Each
    process has its own compile cache, in `caches`: a worker that is stopped may hold a cache's lock.
    """

    command: Sequence[str]
    keys: Sequence[str]
    jobs: int
    deadline: float
    patience: float
    log: Path
    caches: Path
    fresh: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = list(self.keys)
        self.workers: list[Worker] = []
        self.started = 0
        self.measuring: Worker | None = None
        self.inbox: queue.Queue[tuple[Worker, dict[str, Any] | None]] = queue.Queue()

    def run(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each key with the answer of its worker: {"rows": ...} or {"error": ...}."""
        try:
            while time.monotonic() < self.deadline:
                while self.left and len(self.workers) < self.jobs:
                    self._start()
                if not self.workers:
                    return
                with suppress(queue.Empty):
                    yield from self._receive(*self.inbox.get(timeout=0.5))
                yield from self._overdue()
                self._grant()
            for key in [*(worker.key for worker in self.workers if worker.key), *self.left]:
                yield key, {"error": "not reached: no time was left"}
        finally:
            for worker in self.workers:
                worker.kill()

    def _start(self) -> None:
        self.started += 1
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.caches / str(self.started))}
        with self.log.open("a") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, **self.environment, **cache},
            )
        worker = Worker(process)
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._next(worker)

    def _listen(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as lines:
            for line in lines:
                if line.startswith(MARK):
                    self.inbox.put((worker, json.loads(line[len(MARK) :])))
        self.inbox.put((worker, None))

    def _next(self, worker: Worker) -> None:
        worker.key, worker.is_ready = self.left.pop(0), False
        worker.tell({"prepare": worker.key})

    def _receive(self, worker: Worker, answer: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        if worker not in self.workers:
            return
        if answer is None:  # it is gone
            if worker.key:
                yield worker.key, {"error": f"the process ended with {worker.process.wait()}; see {self.log.name}"}
            self._dismiss(worker)
        elif "ready" in answer:
            worker.is_ready = True
        else:
            yield worker.key, answer
            worker.key = ""
            self._release(worker)
            if self.fresh or not self.left:
                self._dismiss(worker)
            else:
                self._next(worker)

    def _overdue(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for worker in list(self.workers):
            waits = worker.is_ready and worker is not self.measuring
            if not waits and time.monotonic() - worker.since > self.patience:
                yield worker.key, {"error": f"no answer for {self.patience:.0f} s; see {self.log.name}"}
                self._dismiss(worker)

    def _grant(self) -> None:
        ready = [worker for worker in self.workers if worker.is_ready]
        if self.measuring is None and ready:
            self.measuring = min(ready, key=lambda worker: self.keys.index(worker.key))
            self._signal(signal.SIGSTOP)
            self.measuring.tell({"measure": self.measuring.key})

    def _release(self, worker: Worker) -> None:
        if worker is self.measuring:
            self._signal(signal.SIGCONT)
            self.measuring = None

    def _signal(self, number: int) -> None:
        for worker in self.workers:
            if worker is not self.measuring:
                with suppress(ProcessLookupError):
                    os.kill(worker.process.pid, number)
                if number == signal.SIGCONT:  # the time it was stopped is not its own
                    worker.since = time.monotonic()

    def _dismiss(self, worker: Worker) -> None:
        self._release(worker)
        worker.kill()
        self.workers.remove(worker)
