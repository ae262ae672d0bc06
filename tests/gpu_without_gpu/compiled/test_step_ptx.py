"""The compiled PTX of the optimizers' steps for sm_80 and sm_120, in the emulator, with bounds and races checked.

Weights and state against the float64 oracle under the error rule; planted errors of the compiled code; and the step of
the optimizers themselves on tensors without numbers, which waits for nothing.
"""

import contextlib

import pytest
import torch

import fused_margin as fm
from fused_margin import step_ops
from fused_margin.backends import BACKENDS
from fused_margin.backends import triton as backend
from fused_margin.spec import Want

from ...error_rule import ErrorRule
from ...test_no_sync import no_waiting
from .. import mutations
from ..fake_driver import recorded
from ..proof import record
from ..ptx import PTXError, launch
from ..step_cases import UPDATES, SweepStep, copied, moved, new_state
from ..steps import emulated, shaped_step, tiny

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = {"batches": (20,), "classes": 40, "dim": 64}
LONG = {"batches": (3,), "classes": 5, "dim": 500}  # rows that several warps share
TAILS = {"batches": (17, 5), "classes": 37, "dim": 50}  # in every dimension; rows that are not aligned to 16 bytes


def check(arch, name, execute=launch, **options):
    rule = ErrorRule()
    with emulated(arch, tiny(), execute):
        SweepStep(name, backend="triton", **options).add_to(rule)
    rule.check()


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize(
    "name, options",
    [
        ("momentum", TAILS),
        ("adamw", {**SMALL, "weight": BF16}),
        pytest.param("dampening", {**SMALL, "layout": "2 centers"}, marks=pytest.mark.slow),
        pytest.param("adamw", {**TAILS, "layout": "index"}, marks=pytest.mark.slow),
        pytest.param("nesterov", SMALL, marks=pytest.mark.slow),
    ],
    ids=["momentum, tails", "adamw, w bf16", "dampening, 2 centers", "adamw, index", "nesterov"],
)
def test_steps(arch, name, options):
    check(arch, name, **options)


def of_rows(arch, name, shape, weight=FP32, execute=launch):
    """What the step moves, by the compiled kernel, by plain PyTorch and exactly; half of the rows, with an index."""
    g, update = torch.Generator().manual_seed(3), UPDATES[name]
    w, rows = torch.randn(shape, generator=g).to(weight), torch.arange(0, shape[0], 2)
    grad, before, found = torch.randn(len(rows), shape[1], generator=g), new_state(update, *shape), []
    with emulated(arch, execute=execute):
        for which, dtype in (("triton", FP32), ("reference", FP32), ("reference", torch.float64)):
            at, state = w.to(weight if dtype == FP32 else dtype, copy=True), copied(before, dtype)
            torch.ops.fused_margin.update_rows(at, *state, rows, grad, *update, which)
            found.append(moved(w, at, state))
    return found


@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize(
    "name, shape, weight", [("adamw", (41, 64), FP32), ("momentum", (9, 50), BF16), ("dampening", (5, 1030), FP32)]
)
def test_rows(arch, name, shape, weight):
    rule = ErrorRule()
    rule.add_all(*of_rows(arch, name, shape, weight))
    rule.check()


def outcome(arch, which=None, texts=None):
    """What the step moves, or the emulator's complaint, with a mutant of the kernel that updates in its place."""

    def execute(ptx, grid, threads, args, smem):
        if ".entry finish_weights(" in ptx:
            if texts is not None:
                texts.append(ptx)
            ptx = ptx if which is None else dict(mutations.mutants(ptx))[which]
        launch(ptx, grid, threads, args, smem=smem)

    try:
        with emulated(arch, tiny(), execute):
            return SweepStep("adamw", backend="triton", **LONG).run()[0]
    except PTXError as e:
        return str(e)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 120])
def test_mutants(arch):
    texts = []
    right, found = outcome(arch, texts=texts), {}
    for name, _ in mutations.mutants(texts[0]):
        result = outcome(arch, name)
        found[name] = isinstance(result, str)
        assert found[name] or all(torch.equal(right[t], result[t]) for t in right), f"{name}: other numbers, no report"
    silent = ", ".join(name for name in found if not found[name]) or "-"
    row = {"kernel": "`finish_weights`, AdamW", "device": f"sm_{arch}", "mutants": len(found)}
    record("mutants", {**row, "reported": sum(found.values()), "not needed here: no bit changes": silent})
    assert any("barrier" in name for name, reported in found.items() if reported)


def test_a_state_that_is_too_short():
    """The last row of the momentum is not there."""

    def execute(ptx, grid, threads, args, smem):
        if ".entry update_rows(" in ptx:
            places = [k for k, a in enumerate(args) if getattr(a, "shape", None) == (41, 64)]
            args = [a[:40] if k == places[1] else a for k, a in enumerate(args)]
        launch(ptx, grid, threads, args, smem=smem)

    with pytest.raises(PTXError, match="out-of-bounds global"):
        of_rows(80, "momentum", (41, 64), execute=execute)


@pytest.fixture
def on_meta(monkeypatch):
    """Triton takes tensors of the meta device, which has no generators, and no autocast; its steps are not left out."""
    monkeypatch.setattr(backend, "why_not", lambda *_: [])
    monkeypatch.setattr(BACKENDS["cpu"], "why_not", lambda *_: ["on another device"])
    monkeypatch.setattr("fused_margin.partial_fc.head._generator", lambda *_: None)
    monkeypatch.setattr("fused_margin.partial_fc.head.PartialFC._same_draws", lambda _: contextlib.nullcontext())
    for name, run in (("update_rows", step_ops._run_update_rows), ("sweep_step", step_ops._run_sweep_step)):
        monkeypatch.setattr(torch.ops.fused_margin, name, run)


OPTIMIZERS = {
    "SweepSGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3},
    "SweepAdamW": {},
    "RowSGD": {"momentum": 0.9, "dampening": 0.1},
    "RowAdamW": {},
}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sampled", [False, True], ids=["all classes", "sampled"])
def test_an_optimizer_waits_for_nothing(name, sampled):
    """On the meta device, which has no values, as in test_no_sync.py; the launches are those of the kernels."""
    options = {"sample_rate": 0.5} if sampled else {}
    head = fm.PartialFC(
        16, 60, fm.CurricularFace(), device="meta", max_local_batch=12, compute_dtype=BF16, **options
    )  # fmt: skip
    with recorded(90) as launches, no_waiting():
        optimizer = getattr(fm.optim, name)([head.weight], lr=0.1, **OPTIMIZERS[name])
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(1 if sampled else 2):
                x = torch.empty(12, 16, device="meta", requires_grad=True)
                head(x, torch.empty(12, device="meta").long()).backward()
            if sampled and name.startswith("Row"):  # on this device autograd gives a sparse gradient without rows
                rows, values = torch.empty(1, 30, device="meta").long(), torch.empty(30, 16, device="meta")
                head.weight.grad = torch.sparse_coo_tensor(
                    rows, values, head.weight.shape, is_coalesced=True, check_invariants=False
                )
            launches.clear()
            optimizer.step()
    kernels = [launch.name for launch in launches]
    calls = 1 if sampled else 2
    of_sweep = ["backward_rows", "prologue"] * calls + ["gradient_kernel", "finish_weights"] * calls
    assert kernels == (of_sweep if name.startswith("Sweep") else ["update_rows"])
    assert launches[-1].args["OPTIMIZER"] == ("sgd" if name.endswith("SGD") else "adamw")
    assert launches[-1].args["INDEXED"] == sampled


@pytest.mark.parametrize("want", [Want.DX, Want.DX | Want.STATS, Want.NONE], ids=["flash", "narrow", "no dX"])
def test_a_step_has_the_forwards_tiles(want):
    """Else norms would be added up in another order, and masks at the threshold decided otherwise."""
    with recorded(90) as launches:
        shaped_step(512, 10**5, 128, want=want, need=0, update=UPDATES["sgd"])
    tiles = {
        (launch.args["SLOTS"], launch.options["num_warps"])
        for launch in launches
        if launch.name in ("sweep_kernel", "gradient_kernel")
    }
    assert len(tiles) == 1
