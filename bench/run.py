"""Measures cases: starts the children, reads their events, and makes rows of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import ROOT
from .cases import Case
from .heads import Peers
from .methods import METHODS
from .results import Row

Say = Callable[[str], None]
PLAIN = Case(classes=0)  # of the axis of classes
FEW = 3  # repeats: with fewer, the row says why


@dataclass
class Limits:
    """What a method may use."""

    memory: int  # bytes a process, 0 for no limit
    budget: float = 3.0  # seconds of repeats of one method
    seconds: float = 150.0  # of one child that measures memory; the one that takes times gets this for each method
    quick: bool = False  # memory is measured once, to see that it can be


class Died(RuntimeError):
    """A child ended without finishing its job."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(f"{status}: {note}" if note else status)
        self.status, self.note = status, note


def child(job: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """The events of a job; raises `Died` after the last one if the process did not end well."""
    paths = [str(ROOT), *(entry for entry in sys.path if entry)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(job["case"]["threads"]),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers, which would outlive and outweigh the child
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, env=environment, start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        if late.is_set():
            raise Died("too slow", f"not done after {seconds:.0f} s")
        if code:
            errors.seek(0)
            raise _died(code, errors.read())


def _died(code: int, stderr: str) -> Died:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if code == -signal.SIGKILL or "MemoryError" in last or "allocate memory" in last or "bad_alloc" in last:
        return Died("out of memory", "")
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Died("failed", f"{name}: {last}"[:200])


class Bench:
    """Measures case after case; rates of products are measured once for each count of threads and dtype."""

    def __init__(self, peers: Peers, limits: Limits, say: Say = lambda text: None) -> None:
        self.peers, self.limits, self.say = peers, limits, say
        self.cases = 0
        self.rates: dict[tuple[int, str, str], float] = {}

    def _job(self, kind: str, case: Case, methods: list[str]) -> dict[str, Any]:
        return {
            "kind": kind,
            "case": case.as_dict(),
            "methods": methods,
            "peers": list(self.peers),
            "memory_limit": self.limits.memory,
            "budget": self.limits.budget,
        }

    def rate(self, case: Case) -> float:
        key = (case.threads, case.dtype, case.device)
        if key not in self.rates:
            self.say(f"rate of {case.dtype} products")
            job = self._job("floor", case, []) | {"budget": 0.5}
            try:
                self.rates[key] = next(iter(list(child(job, self.limits.seconds))))["rate"]
            except Died as died:
                raise Died(died.status, f"{died.note} while the rate of products was measured".strip()) from None
        return self.rates[key]

    def measure(self, case: Case, methods: list[str], progress: Callable[[], None] = lambda: None) -> list[Row]:
        """The rows of a case, one a method; `progress` is called len(methods) + 1 times."""
        rate = self.rate(case)
        rows = {name: Row(case, name, "ok", floor_rate=rate) for name in methods}
        for name, row in rows.items():
            reason = METHODS[name].why_not(case, self.peers)
            if reason:
                row.status, row.note = "skipped", reason
            elif self._wants_memory(case, name):
                self.say(f"memory of {name}")
                self._measure_memory(row)
            progress()
        self.cases += 1
        self._measure_time(case, rows)
        progress()
        for row in rows.values():
            self._finish(row)
        return list(rows.values())

    def _wants_memory(self, case: Case, name: str) -> bool:
        """Of all methods where memory is what matters, elsewhere of the two in the table: a process takes seconds."""
        if self.limits.quick:
            return self.cases == 0
        plain = replace(case, classes=0, threads=PLAIN.threads, device=PLAIN.device) == PLAIN
        return name in ("fused", "eager") or case.margin == "normface" or plain

    def _measure_memory(self, row: Row) -> None:
        try:
            for event in child(self._job("memory", row.case, [row.method]), self.limits.seconds):
                row.status, row.note = event["status"], event.get("note", "")
                row.peak = event.get("peak")
        except Died as died:
            row.status, row.note = died.status, died.note

    def _measure_time(self, case: Case, rows: dict[str, Row]) -> None:
        going = [name for name, row in rows.items() if row.status == "ok"]
        if not going:
            return
        at = ""
        try:
            for event in child(self._job("time", case, going), self.limits.seconds * len(going)):
                if "at" in event:
                    at = event["at"]
                    self.say(f"time of {at}")
                elif "seconds" in event:
                    rows[event["method"]].seconds.append(event["seconds"])
                else:
                    row = rows[event["method"]]
                    row.status, row.note = event["status"], event.get("note", "")
                    row.error = event.get("error", row.error)
        except Died as died:
            for name in going:
                if name == at or (rows[name].status == "ok" and not rows[name].seconds):
                    rows[name].status, rows[name].note = died.status, died.note or f"while {at} ran"
                elif rows[name].status == "ok" and len(rows[name].seconds) < FEW:
                    rows[name].note = f"{_repeats(rows[name])} only: {at} ended the process"

    def _finish(self, row: Row) -> None:
        """A speed is kept only with a green gate; marks say in words what happened."""
        if row.status == "ok" and not row.seconds:
            row.status, row.note = "failed", row.note or "the process that takes times ended before its turn"
        if row.status != "ok":
            row.seconds = []
        if row.status == "out of memory" and row.case.device == "cpu":
            row.note = f"out of memory at {self.limits.memory / 2**30:.0f} GB"
        elif row.status == "ok" and len(row.seconds) < FEW and not row.note:
            row.note = f"{_repeats(row)} only: slow beside the {self.limits.budget:.0f} s of repeats that a method gets"


def _repeats(row: Row) -> str:
    return "1 repeat" if len(row.seconds) == 1 else f"{len(row.seconds)} repeats"


def default_memory_limit() -> int:
    """Nine tenths of what is free now, in whole GB; 0 where no one says."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 0
    line = next(x for x in info.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(int(line.split()[1]) * 1024 * 0.9) // 2**30 * 2**30
