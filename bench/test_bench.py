"""The cases of `python -m bench` as entries of pytest-benchmark, memory and picture left out:

    pytest bench --benchmark-autosave; pytest bench --benchmark-compare      -k arcface-fp32-64: some of them
    pytest bench -m 'slow or not slow'                                       the large ones too: minutes, many GB

A method must pass the parity gate first. INSIGHTFACE and CUT_CROSS_ENTROPY are paths, as the options of
`python -m bench`.
"""

import os
import resource

import pytest
import torch

from . import gate
from .cases import Case, axes
from .child import out_of_memory
from .heads import Inputs, Peers, inputs_of
from .methods import METHODS
from .run import default_memory_limit

PEERS = Peers(os.environ.get("INSIGHTFACE"), os.environ.get("CUT_CROSS_ENTROPY"))
QUICK_LOGITS = 13_000_000  # of a case that is not marked slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def entries():
    threads = min(2, torch.get_num_threads())
    for case in dict.fromkeys(case for cases in axes(threads, DEVICE).values() for case in cases):
        marks = [pytest.mark.slow] if case.batch * case.classes > QUICK_LOGITS else []
        for name in METHODS:
            yield pytest.param(case, name, id=f"{case.name}-{name}", marks=marks)


_held: dict[Case, tuple[Inputs, dict[bool, gate.Expected]]] = {}


def shared(case: Case) -> tuple[Inputs, dict[bool, gate.Expected]]:
    """Inputs of a case and what the gate expects of them, while one method after another is measured."""
    if case not in _held:
        _held.clear()  # before the next ones come: those of one case may be 9 GB
        _held[case] = inputs_of(case), {}
    return _held[case]


@pytest.fixture
def limits():
    """As many threads as a case asks for, and memory that runs out before the machine's does."""
    threads, memory = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_DATA)
    if DEVICE == "cpu" and default_memory_limit():
        resource.setrlimit(resource.RLIMIT_DATA, (default_memory_limit(), memory[1]))
    yield
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_DATA, memory)


@pytest.mark.parametrize("case, name", list(entries()))
def test_time(case, name, benchmark, limits):
    method = METHODS[name]
    reason = method.why_not(case, PEERS)
    if reason:
        pytest.skip(f"{name}: {reason}")
    torch.set_num_threads(case.threads)
    benchmark.group = case.name
    try:
        inputs, expected = shared(case)
        if method.detached not in expected:
            expected[method.detached] = gate.expected(case, inputs, method.detached)
        run = method.build(case, inputs, PEERS)
        error, red = gate.verdict(case, gate.errors(run, expected[method.detached], run()))
        assert not red, red
        benchmark.extra_info |= {"gate error": error, "threads": case.threads}

        def work():
            run()
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(work, setup=run.clear, rounds=5, warmup_rounds=1)
        run.clear()
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        pytest.skip(f"{name}: out of memory at {default_memory_limit() / 2**30:.0f} GB")
