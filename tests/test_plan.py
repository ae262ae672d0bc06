"""The planner: its memory against what a training on the CPU takes, its arithmetic by hand, its words."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fused_margin import plan
from fused_margin.__main__ import main
from fused_margin.plan import Setup

from .conftest import require

CHILD = """
import json, sys
import torch
import fused_margin as fm
from fused_margin import ops
from fused_margin.rules import IDENTITY
from fused_margin.spec import Need, Spec, Want

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAKE = {
    ("sgd", True): lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    ("adamw", True): lambda p: torch.optim.AdamW(p, foreach=True),
    ("sgd", False): lambda p: fm.optim.RowSGD(p, lr=0.1, momentum=0.9),
    ("adamw", False): lambda p: fm.optim.RowAdamW(p),
    ("sweep-sgd", True): lambda p: fm.optim.SweepSGD(p, lr=0.1, momentum=0.9),
    ("sweep-adamw", True): lambda p: fm.optim.SweepAdamW(p),
}

def sampled_step(x, w, labels, index, optimizer):  # as a sharded head does it: rows by their numbers, a sparse gradient
    spec = Spec(num_classes=len(index), want=Want.DX | Want.DW, backend="cpu")
    inputs = x, w.detach(), labels, torch.full((len(x),), 16.0), None, None, index, IDENTITY.tensor(x)
    red, cos_y, sum_u, *left = torch.ops.fused_margin.sweep(*inputs, *spec)
    g = torch.ones(len(x))
    d_x, d_w, *_ = torch.ops.fused_margin.sweep_backward(
        g, -g, 0 * g, *inputs, red, *left, *spec, Need.X | Need.W
    )
    w.grad = torch.sparse_coo_tensor(index[None], d_w, w.shape, is_coalesced=True, check_invariants=False)
    optimizer.step()
    w.grad = None

def train(classes, dim, batch, optimizer, rate, weight, embedding, steps=2):
    w = torch.nn.Parameter(torch.empty(classes, dim, dtype=DTYPES[weight]))
    w.data.normal_()
    labels = torch.randint(classes, (batch,)) if rate == 1 else torch.randint(int(classes * rate), (batch,))
    made = MAKE[optimizer, rate == 1]([w])
    for _ in range(steps):
        x = torch.randn(batch, dim).to(DTYPES[embedding]).requires_grad_()
        if rate < 1:
            sampled_step(x.detach(), w, labels, torch.arange(int(classes * rate)) * int(1 / rate), made)
            continue
        fm.margin_cross_entropy(x, w, labels, fm.ArcFace(), backend="cpu").backward()
        made.step()
        made.zero_grad()

torch.set_num_threads(2)
found = []
for case in json.loads(sys.argv[1]):
    train(2000, *case[1:])  # code and buffers that stay
    fm.memory.release()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    train(*case)
    found.append(status("VmHWM") - before)
print(json.dumps(found))
"""
CASES = [
    ("sgd", 1.0, "fp32", "fp32"),
    ("sgd", 1.0, "bf16", "bf16"),
    ("sgd", 0.1, "fp32", "fp32"),
    ("adamw", 1.0, "fp32", "fp32"),
    ("adamw", 0.1, "fp32", "bf16"),
    ("sweep-sgd", 1.0, "fp32", "fp32"),
    ("sweep-adamw", 1.0, "fp32", "fp32"),
    ("sweep-sgd", 1.0, "bf16", "bf16"),
]


def test_memory_is_what_a_training_takes():
    """Within 5% and 4 MiB of the peak that the operating system counts, of 40 to 110 MB."""
    require("cpu")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    classes, dim, batch = 100_000, 64, 128
    cases = [(classes, dim, batch, *case) for case in CASES]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},  # what is freed goes back to the system
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    wrong = []
    for (optimizer, rate, weight, embedding), measured in zip(CASES, json.loads(child.stdout), strict=True):
        setup = Setup(classes, dim, 1, batch, rate, optimizer, weight, embedding)
        planned = sum(plan.memory(setup).values())
        if abs(measured - planned) > 0.05 * planned + 4 * 2**20:
            wrong.append(f"{optimizer} {rate} {weight}: {measured / 1e6:.1f} MB, planned {planned / 1e6:.1f}")
    assert not wrong, "; ".join(wrong)


def test_by_hand():
    """The issue's own question, on eight ranks."""
    setup = Setup(30_000_000, 512, 8, 1024, 0.1, "sgd")
    items = plan.memory(setup)
    assert setup.shard == 3_750_000
    assert setup.sampled == 375_000
    assert items["weights"] == items["momentum"] == 3_750_000 * 512 * 4
    assert items["row-sparse gradient"] == 375_000 * (512 * 4 + 8)
    assert "gradient" not in items
    transfers = {(t.collective, t.what): t.bytes for t in plan.communication(setup)}
    assert transfers["all_gather", "embeddings and labels"] == 7 / 8 * 1024 * (2048 + 8)
    assert transfers["reduce_scatter", "gradient of the embeddings, fp32"] == 7 / 8 * 1024 * 2048
    assert transfers["all_gather", "log-sum-exps, target cosines"] == 7 * 4 * 8 * 1024
    assert len(transfers) == 3
    large = plan.communication(replace(setup, world=64, batch=65_536))  # where a gather would take 128 MiB
    assert [t.collective for t in large] == ["all_gather", "all_reduce", "all_reduce", "reduce_scatter"]
    assert large[1].bytes + large[2].bytes == 2 * 63 / 64 * 5 * 8 * 65_536
    assert len(plan.communication(replace(setup, mask=True))) == 4
    assert not plan.communication(replace(setup, world=1))
    forward, backward, optimizer = plan.phases(setup)
    assert forward.operations == backward.operations == 4 * 1024 * 375_000 * 512
    assert optimizer.bytes == 20 * 375_000 * 512  # reads dW, w and momentum, writes w and momentum
    sweep = plan.phases(replace(setup, optimizer="sweep-sgd"))[1]
    assert sweep.bytes == 16 * 375_000 * 512
    times = plan.seconds(replace(setup, embedding_dtype="bf16"))
    assert times["forward"] == pytest.approx(4 * 1024 * 375_000 * 512 / (0.6 * 989e12))
    assert times["optimizer"] == pytest.approx(20 * 375_000 * 512 / (0.85 * 3350e9))


def test_sweep_optimizers_save_one_copy_of_the_weights():
    for optimizer in ("sgd", "adamw"):
        setup = Setup(5_000_000, optimizer=optimizer)
        copies = {"sgd": 1, "adamw": 2}[optimizer]  # torch.optim.AdamW has a temporary besides
        saved = plan.total(setup) - plan.total(replace(setup, optimizer=f"sweep-{optimizer}"))
        assert saved == pytest.approx(copies * 5_000_000 * 512 * 4 / 1e9, rel=0.01)


@pytest.mark.parametrize("optimizer", plan.OPTIMIZERS)
@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_what_fits(optimizer, rate):
    """The largest number of classes fits, a hundredth more does not; each suggestion is a setup that is better."""
    setup = Setup(100_000_000, 512, 4, 4096, rate, optimizer, memory=24, reserve=4)
    most = plan.most_classes(setup)
    assert plan.fits(replace(setup, classes=most))
    assert not plan.fits(replace(setup, classes=most + most // 100))
    assert not plan.fits(setup)
    assert plan.suggestions(setup)
    for text, other in plan.suggestions(setup):
        assert plan._gain(setup, other) > 0.02 or text.endswith(" ranks")
        if text.endswith(" ranks"):
            assert plan.fits(other)
            assert other.world >= 64 or not plan.fits(replace(other, world=other.world - 1))
    assert plan.most_classes(replace(setup, memory=4.001)) == 0


def test_hundred_million_classes_on_64_ranks():
    setup = Setup(100_000_000, 512, 64, 8192, 0.1, "sweep-sgd")
    assert plan.total(setup) == pytest.approx(2 * 1_562_500 * 2048 / 1e9, rel=0.05)
    text = plan.report(setup)
    assert "fits in 80 GB" in text
    assert "50 GB/s between ranks" in text


def run(arguments: str) -> int:
    return main(["plan", *arguments.split()])


def test_command(capsys):
    assert run("--classes 30e6 --dim 512 --world 8 --batch 1024 --sample-rate 0.1 --optimizer sgd") == 0
    text = capsys.readouterr().out
    for part in (
        "30,000,000 classes x 512 on 8 ranks: 3,750,000 classes each, 375,000 of them sampled",
        "row-sparse gradient",
        "reduce_scatter",
        "MODEL for h100, not a measurement",
        "fm.optim.SweepSGD: no gradient tensor",
        "NVIDIA H100 Tensor Core GPU datasheet",
    ):
        assert part in text
    assert "DOES NOT FIT" not in text
    assert run("--classes 30e6 --memory 16 --optimizer adamw") == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT in 16 GB" in text
    assert " ranks  " in text
    assert "weights in bfloat16" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--classes many", "'many'; expected a whole number of at least 1, as 30000000 or 30e6"),
        ("--classes 1.5", "'1.5'; expected a whole number"),
        ("--classes inf", "'inf'; expected a whole number"),
        ("--classes 1e6 --world 0", "'0'; expected a whole number"),
        ("--classes 1e6 --sample-rate 0", "sample_rate = 0.0; expected a number above 0, up to 1"),
        ("--classes 1e6 --sample-rate nan", "sample_rate = nan"),
        ("--classes 1e6 --memory -1", "memory = -1.0; expected GB of one rank, above 0"),
        ("--classes 1e6 --memory 8 --reserve 9", "reserve = 9.0; expected GB from 0 to below the 8 of a rank"),
        ("--classes 1e6 --device abacus", "invalid choice: 'abacus'"),
        ("--classes 1e6 --optimizer lion", "invalid choice: 'lion'"),
        ("", "the following arguments are required: --classes"),
    ],
)
def test_bad_input(capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(arguments)
    assert message in capsys.readouterr().err


def test_bad_setups():
    with pytest.raises(ValueError, match=r"batch = 1024\.0; expected a whole number"):
        Setup(10, batch=1024.0)
    with pytest.raises(ValueError, match="optimizer = 'lion'; expected one of sgd, adamw"):
        Setup(10, optimizer="lion")
