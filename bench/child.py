"""The process in which measuring happens: a job as JSON on stdin, events as JSON lines on stdout.

Jobs: `memory`, the peak of one step of one method; `time`, the gate and the interleaved repeats of all methods of a
case; `floor`, the best rate of a product. The limit of memory holds here, so that running out of it is an event.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from head_cost import PeakMemory

import fused_margin as fm

from . import gate
from .cases import Case
from .floor import best_rate
from .heads import Inputs, Peers, Run, inputs_of
from .methods import METHODS
from .timing import HOPELESS, inner_loops, repeats, timed

Emit = Callable[..., None]
LARGE_FLOPS = 1e10  # of a step before which its time is guessed
PART = 20


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text for words in ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory")
    )


def limit_memory(limit: int) -> None:
    """Of this process: RLIMIT_DATA counts what is written to; address space that is only reserved is free."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def failure(error: BaseException) -> dict[str, str]:
    if out_of_memory(error):
        return {"status": "out of memory", "note": ""}
    first = str(error).strip().split("\n")[0]
    return {"status": "failed", "note": f"{type(error).__name__}: {first}"[:200]}


def _tidy() -> None:
    gc.collect()
    fm.memory.release()  # what the library holds of a warm-up counts as made by the step that is measured
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _build(case: Case, name: str, peers: Peers, inputs: Inputs | None = None) -> Run:
    return METHODS[name].build(case, inputs or inputs_of(case), peers)


class Hopeless(RuntimeError):
    """A step would take too long."""


def warm_up(case: Case, name: str, peers: Peers, longest: float) -> None:
    """Steps that load what is loaded once; raises `Hopeless` where a part of the classes says all take too long."""
    _build(replace(case, batch=8, classes=512, dim=64), name, peers)()
    if case.flops < LARGE_FLOPS:
        return
    seconds = PART * timed(_build(replace(case, classes=case.classes // PART), name, peers), case.device)
    if seconds > longest:
        raise Hopeless(f"about {seconds:.0f} s a step, going by one in {PART} of the classes")


def peak_bytes(case: Case, name: str, peers: Peers) -> int | None:
    """The peak of one step beyond inputs and weights."""
    run = _build(case, name, peers)
    made = 0  # by the first step, and there to stay: it counts as made by the step that is measured
    if METHODS[name].compiles or run.optimizer is not None:
        run()
        run.clear()
    if run.optimizer is not None:
        made = sum(t.nbytes for s in run.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    _tidy()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return made + torch.cuda.max_memory_allocated() - before
    peak = PeakMemory()
    before = peak.restart()
    run()
    after = peak.read()
    return None if before is None or after is None else made + max(after - before, 0)


def memory_job(case: Case, job: dict[str, Any], emit: Emit) -> None:
    name, peers = job["methods"][0], Peers(*job["peers"])
    try:
        if not METHODS[name].compiles:
            warm_up(case, name, peers, HOPELESS * job["budget"])
        peak = peak_bytes(case, name, peers)
    except Hopeless as hopeless:
        emit(status="too slow", note=str(hopeless))
    except Exception as error:  # of anybody's code
        emit(**failure(error))
    else:
        emit(status="ok", peak=peak)


def _through_gate(case: Case, name: str, run: Run, want: gate.Expected, budget: float, emit: Emit) -> float | None:
    """Seconds of a step, or None if no more steps follow: the gate is red, it fails, or one was enough."""
    try:
        run.clear()
        losses: list[torch.Tensor] = []
        seconds = timed(lambda: losses.append(run()), case.device)
        loss = losses[0]
        error, reason = gate.verdict(case, gate.errors(run, want, loss))
        run.clear()
        if reason:
            emit(method=name, status="red gate", note=reason, error=error)
            return None
        method = METHODS[name]
        slow = not method.compiles and repeats(seconds, budget, method.baseline) == 1
        if method.compiles or seconds < 1:  # the first step of all may be much slower than the others
            seconds = timed(run, case.device, before=run.clear)
        run.clear()
    except Exception as problem:  # of anybody's code
        run.clear()
        emit(method=name, **failure(problem))
        return None
    emit(method=name, status="ok", error=error)
    if slow:
        emit(method=name, seconds=seconds)
    return None if slow else seconds


def time_job(case: Case, job: dict[str, Any], emit: Emit) -> None:
    """The gate, then rounds in which each method that passed has its turn, forwards and backwards alternately.

    A turn is a step without the clock and one with it. In training a head follows itself; right after another method,
    that has left the memory otherwise, a step was seen to take up to twice as long.
    """
    peers, budget = Peers(*job["peers"]), job["budget"]
    inputs = inputs_of(case)
    expected: dict[bool, gate.Expected] = {}
    runs: dict[str, tuple[Run, int, int]] = {}
    for name in job["methods"]:
        emit(at=name)
        detached = METHODS[name].detached
        if detached not in expected:
            expected[detached] = gate.expected(case, inputs, detached)
        try:
            run = _build(case, name, peers, inputs)
        except Exception as error:  # of anybody's code
            emit(method=name, **failure(error))
            continue
        one = _through_gate(case, name, run, expected[detached], budget, emit)
        if one is not None:
            runs[name] = (run, repeats(one, budget, METHODS[name].baseline), inner_loops(one))
    expected.clear()
    _tidy()
    for number in range(max((count for _, count, _ in runs.values()), default=0)):
        turn = list(runs) if number % 2 else list(reversed(runs))
        for name in turn:
            run, count, inner = runs[name]
            if number >= count:
                continue
            emit(at=name)
            try:
                run.clear()
                run()
                seconds = timed(run, case.device, inner, before=run.clear)
            except Exception as error:  # of anybody's code
                emit(method=name, **failure(error))
                runs[name] = (run, 0, 0)
            else:
                emit(method=name, seconds=seconds)
            run.clear()


def floor_job(case: Case, job: dict[str, Any], emit: Emit) -> None:
    rate, name = best_rate(case.dtype, case.device, job["budget"])
    emit(rate=rate, name=name)


JOBS = {"memory": memory_job, "time": time_job, "floor": floor_job}


def main() -> None:
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no event
    job = json.load(sys.stdin)
    case = Case(**job["case"])

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    torch.set_num_threads(case.threads)
    if job["memory_limit"] and case.device == "cpu":
        limit_memory(job["memory_limit"])
    JOBS[job["kind"]](case, job, emit)


if __name__ == "__main__":
    main()
