"""What goes between the ranks in a step: which collectives, in which order, of which type."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm

from .threads import run_threads

D, C = 8, 30
NEW_NAMES = {"all_gather_into_tensor": "all_gather_single", "reduce_scatter_tensor": "reduce_scatter_single"}
KINDS = {
    name: kind
    for kind, old in (("gather", "all_gather_into_tensor"), ("d_x", "reduce_scatter_tensor"), ("sum", "all_reduce"))
    for name in (old, NEW_NAMES.get(old, old))
}
_of_thread = threading.local()


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """torch.distributed's own functions write down that they were called."""

    def wrap(kind, original):
        def call(*args, **kwargs):
            if getattr(_of_thread, "watch", None) is not None:
                _of_thread.watch.seen.append(kind)
                _of_thread.watch.types.append((kind, [t.dtype for t in args if isinstance(t, torch.Tensor)]))
            return original(*args, **kwargs)

        return call

    for name, kind in KINDS.items():
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, wrap(kind, getattr(dist, name)))


class Watch(TorchDispatchMode):
    """Collectives of this thread, and what the backward's sweeps are asked for, in order."""

    def __init__(self):
        super().__init__()
        self.seen, self.types = [], []

    def __enter__(self):
        _of_thread.watch = self
        return super().__enter__()

    def __exit__(self, *args):
        _of_thread.watch = None
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("fused_margin.sweep_backward"):
            self.seen.append(f"sweep for {int(args[-1])}")
        return func(*args, **kwargs or {})


def watched(splits=(3, 3), dtype=torch.float32, sample_weight=False, **options):
    def body():
        head = fm.PartialFC(D, C, **{"margin": fm.ArcFace(0.3)} | options)
        g = torch.Generator().manual_seed(head.ranks.rank)
        x = torch.randn(splits[head.ranks.rank], D, generator=g).to(dtype).requires_grad_()
        labels = torch.randint(C, (len(x),), generator=g)
        watch = Watch()
        with watch:
            loss = head(x, labels, sample_weight=torch.ones(len(x)) if sample_weight else None)
            watch.seen.append("backward")
            loss.backward()
        return watch, x.grad

    out = run_threads(len(splits), body)
    assert all(watch.seen == out[0][0].seen for watch, _ in out), "the same collectives in the same order on all"
    return out[0]


SIZES = ROWS = MERGE = "gather"  # rows of each rank; embeddings and labels; what the shards found
D_X, SUM = "d_x", "sum"
FORWARD = [SIZES, ROWS]
BACKWARD = ["backward", "sweep for 1", D_X, "sweep for 2"]  # d_x leaves before the sweep for d_w starts
CASES = {
    "plain": ({}, [*FORWARD, MERGE, *BACKWARD]),
    "sampled": ({"sample_rate": 0.2}, [*FORWARD, MERGE, *BACKWARD]),
    "ragged": ({"splits": (1, 4, 0)}, [*FORWARD, MERGE, *BACKWARD]),
    "known size": ({"max_local_batch": 3}, [ROWS, MERGE, *BACKWARD]),
    "weights of the rows": ({"sample_weight": True}, [*FORWARD, MERGE, *BACKWARD]),
    "a mask": ({"margin": fm.SVSoftmax(1.2)}, [*FORWARD, SUM, MERGE, *BACKWARD]),
    "smoothing": ({"label_smoothing": 0.1}, [*FORWARD, MERGE, *BACKWARD]),
    "hard rivals' mean": ({"margin": fm.NPCFace()}, [*FORWARD, SUM, MERGE, *BACKWARD]),
    "norms": ({"margin": fm.MagFace()}, [*FORWARD, MERGE, *BACKWARD]),
    "values by class": (
        {"margin": fm.ArcFace(torch.full((C,), 0.3)), "class_weight": torch.ones(C)},
        [*FORWARD, SUM, MERGE, *BACKWARD],
    ),
    "a scale with gradient": (
        {"scale": "norm"},
        [*FORWARD, MERGE, "backward", "sweep for 5", D_X, SUM, "sweep for 2"],
    ),
    "bias": ({"bias": True}, [*FORWARD, MERGE, SUM, "backward", "sweep for 1", D_X, "sweep for 10"]),
}


@pytest.mark.parametrize("name", CASES)
def test_collectives(name):
    options, expected = CASES[name]
    assert watched(**options)[0].seen == expected


def test_embeddings_of_16_bits_are_summed_in_float32():
    watch, grad = watched(dtype=torch.bfloat16)
    types = [dtypes for kind, dtypes in watch.types if kind == D_X]
    assert types == [[torch.float32] * 2]
    assert grad.dtype == torch.bfloat16


def test_one_rank_sends_nothing():
    head = fm.PartialFC(D, C, fm.SVSoftmax(1.2), sample_rate=0.5)
    with Watch() as watch:
        head(torch.randn(4, D, requires_grad=True), torch.randint(C, (4,))).backward()
    assert [name for name in watch.seen if "sweep" not in name] == []
