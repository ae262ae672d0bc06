"""One rank of the tests on processes: python -m tests.distributed.worker JOB FOLDER, with torchrun's environment."""

import datetime
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
from fused_margin import partial_fc

from ..cases import FP64
from ..test_losses import data
from .sharded import build, part, step
from .trainings import steps, training

SPLITS = (6, 4)
HEADS = {  # whose embeddings get a gradient beside that of the sweep
    "magface": lambda make, **more: make(8, 30, fm.MagFace(0.5, 3.0), 16.0, **more),
    "a-softmax": lambda make, **more: make(8, 30, fm.SphereFace(4), "norm", **more),
}
ELASTIC = ("elasticface-arc", "elasticface-cos", "elasticface+")
DIES_AT, EVERY = 5, 2  # steps


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(10, 5, generator=g).double(), torch.randint(30, (10,), generator=g)


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 8).double()


def averaged_gradients(folder: Path) -> None:
    """What DDP leaves in the network's gradients."""
    x, labels = batch()
    found = {}
    for name, make in HEADS.items():
        head, body = make(fm.PartialFC, dtype=torch.float64), DistributedDataParallel(network())
        head(body(x[part(SPLITS)]), labels[part(SPLITS)]).backward()
        found |= {f"{name}.{n}": p.grad for n, p in body.module.named_parameters()}
    torch.save(found, folder / f"averaged{dist.get_rank()}")


def draws(folder: Path) -> None:
    """Margins that draw: alike on all ranks, though their generators stand elsewhere."""
    for name in ELASTIC:
        inputs = data(name, FP64, 0)
        torch.manual_seed(100 + dist.get_rank())
        head = build(name, FP64, inputs, seed=3)
        torch.manual_seed(100 + dist.get_rank())
        before = torch.get_rng_state()
        outcome = step(head, inputs, (20, 21))
        assert torch.equal(torch.get_rng_state(), before), "the user's generator is left as it was"
        torch.save(outcome, folder / f"{name}{dist.get_rank()}")


def equal(folder: Path) -> None:
    averaged_gradients(folder)
    draws(folder)


def die(folder: Path) -> None:
    """Rank 1 is killed in the middle of a step; checkpoints lie behind it."""
    head, optimizer, body = training()
    for k in range(DIES_AT):
        steps(head, optimizer, body, k, k + 1)
        if k % EVERY == EVERY - 1:
            partial_fc.save(folder / "c", head, optimizer, body, {"step": torch.tensor(k + 1)})
    if dist.get_rank() == 1:
        head._check_labels = lambda batch: os.kill(os.getpid(), signal.SIGKILL)
    steps(head, optimizer, body, DIES_AT, DIES_AT + 1)


def main(job: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    {"equal": equal, "die": die}[job](Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
        status = 0
    except Exception:
        traceback.print_exc()
        status = 1
    # No finalization of the interpreter: gloo's threads are alive in it, whether destroy_process_group was not reached
    # or DDP and DTensor hold the group beyond it, and one that then drops a tensor aborts the process, with "terminate
    # called without an active exception" (pytorch/pytorch#190489).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
