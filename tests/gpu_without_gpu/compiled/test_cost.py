"""The model's bytes and operations (bench/cost.py) against what the emulator counts in the compiled code."""

import pytest
import torch

from bench import cost, roofline

from ... import cases
from .. import steps
from ..fake_driver import recorded
from ..ptx import launch
from ..step_cases import UPDATES, SweepStep, new_state


def counted(device, margin, mode, shape, **options):
    """[(kernel, counts)] of a step that runs in the emulator."""
    found = []
    problem = cases.problem(cases.MARGINS[margin], cases.MODES[mode], *shape, **options)
    with steps.emulated(80, device, lambda *args, **kwargs: found.append(launch(*args, **kwargs))) as driver:
        cases.run(problem, "triton")
    return [(name, counts) for (name, _), counts in zip(driver.launches, found, strict=True)]


def modelled(device, shape, **options):
    with recorded(80) as launches, steps.configs.use(device):
        steps.shaped_step(*shape, **options)
    return [(launch.name, cost.of_launch(launch)) for launch in launches]


@pytest.mark.parametrize("flash", [0, pytest.param(128, marks=pytest.mark.slow)], ids=["chunk", "flash"])
@pytest.mark.parametrize("shape", [(20, 130, 64), pytest.param((70, 96, 128), marks=pytest.mark.slow)], ids=str)
def test_sweeping_kernels(shape, flash):
    """Exact: operations of the tensor cores, bytes read, bytes written."""
    device = steps.tiny(flash_width=flash)
    got, model = (
        {name: figures for name, figures in found if name in cost.KERNELS}
        for found in (counted(device, "cosface", "bf16", shape), modelled(device, shape, dtype=torch.bfloat16))
    )
    assert got.keys() == model.keys() == cost.KERNELS.keys() - {"update_rows"}
    for name, counts in got.items():
        assert (model[name].flops, model[name].read, model[name].written) == counts[1:], name


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_updating_kernels(name):
    """Exact too: a step's gradient used up on weights and state, and rows with their gradients in memory."""
    found, (batch, classes, dim) = [], (20, 130, 64)
    with steps.emulated(80, steps.tiny(), lambda *args, **kwargs: found.append(launch(*args, **kwargs))) as driver:
        SweepStep(name, backend="triton", batches=(batch,), classes=classes, dim=dim).run()
        w, rows, state = torch.ones(classes, dim), torch.arange(0, classes, 2), new_state(UPDATES[name], classes, dim)
        torch.ops.fused_margin.update_rows(w, *state, rows, w[rows], *UPDATES[name], "triton")
    with recorded(80) as launches, steps.configs.use(steps.tiny()):
        steps.shaped_step(batch, classes, dim, dtype=torch.float32, need=0, update=UPDATES[name])
        steps.shaped_rows(classes // 2, classes, dim, UPDATES[name])
    model = {launch.name: cost.of_launch(launch) for launch in launches}
    for (kernel, _), counts in list(zip(driver.launches, found, strict=True))[-2:]:
        assert (model[kernel].read, model[kernel].written) == counts[2:], kernel


@pytest.mark.slow
def test_row_kernels():
    """Roughly, all together: B x D numbers beside C x D."""
    device, shape = steps.tiny(), (70, 130, 64)
    got, model = counted(device, "arcface_linear", "bf16", shape), modelled(device, shape, dtype=torch.bfloat16)
    assert [name for name, _ in got] == [name for name, _ in model]
    read, expected = (sum(figures.read for name, figures in f if name not in cost.KERNELS) for f in (got, model))
    assert 0.6 * read < expected < 1.5 * read, (read, expected)


def test_other_heads():
    """A product, a view, an expanded norm and a reduction count as they should."""
    x = torch.empty(8, 16, device="meta")
    with cost.Dispatched() as seen:
        y = torch.mm(x, x.t())
        (y / y.norm(dim=1, keepdim=True).expand_as(y)).sum()
    size = 8 * 8 * 4
    assert [(c.name, c.read, c.written, c.flops) for c in seen.costs] == [
        ("mm", 2 * 8 * 16 * 4, size, 2 * 8 * 8 * 16),
        ("linalg_vector_norm", size, 32, 0),
        ("div", size + 32, size, 0),
        ("sum", size, 4, 0),
    ]


@pytest.mark.parametrize("classes", [10**5, 3 * 10**7])
@pytest.mark.parametrize("arch", [80, 90, 120, "gfx942"])
def test_launches(arch, classes):
    """At most 4 forward and 4 a chunk of classes; one grid axis, within 2^31, at 30 million classes too."""
    with recorded(arch) as launches:
        steps.shaped_step(512, classes, 512, need=0)
    assert [launch.name for launch in launches] == ["prologue", "sweep_kernel", "epilogue", "row_loss"]
    names = [c.name for c in cost.of_fused_step(arch, 512, classes, 512)][4:]
    chunks = names.count("gradient_kernel")
    of_chunk = ["gradient_kernel", cost.GEMM, cost.GEMM, "finish_weights"]
    assert names == ["backward_rows", "prologue", *of_chunk * chunks, "finish_x"]
    with recorded(arch) as launches:
        steps.shaped_step(512, classes, 512)
    assert all(len(launch.grid) == 1 and launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.slow
def test_the_model_says_that_it_is_one():
    assert all(
        "model" in text.lower() for text in (roofline.time_table(), roofline.step_table(), roofline.launch_table())
    )
    device = roofline.DEVICES["H100"]
    for shape in roofline.SHAPES:
        floor, *others = (
            roofline.seconds(roofline.costs_of(method, device, shape), device)
            for method in ("floor", *roofline.METHODS)
        )
        assert all(floor < other for other in others), shape
