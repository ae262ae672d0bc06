"""How csrc/cuda cuts a sweep: its plan, and the launches of the real operators, up to 30 million classes and more."""

import re

import pytest
import torch

import fused_margin as fm
from bench import roofline
from fused_margin import ops
from fused_margin.backends import cuda
from fused_margin.spec import Spec, Want
from fused_margin.update_rules import State, Update

from .backend import emulated, simulated
from .planned import OPERANDS, cache_for_chunk, plan, splits_of
from .test_step_numbers import draw

DEVICES = {name: (d.processors, d.cache) for name, d in roofline.DEVICES.items() if d.processors} | {
    "RTX 3090": (82, 6)
}
MOST_PROGRAMS = 2**31 - 1  # of the one grid axis in use


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [1, 127, 10**6, 3 * 10**7, 2**31 - 2**20 - 1])
def test_limits(device, classes):
    programs, l2 = DEVICES[device]
    cache = cache_for_chunk(l2 << 20)
    for batch in (1, 128, 512, 4096, 65536):
        for centers in (1, 2, 3, 16):
            for operands in OPERANDS:
                p = plan(batch, 512, classes, centers, operands, programs, cache)
                slots = p.tile_classes * (1 << (centers - 1).bit_length())
                assert p.padded == p.blocks * 128 >= batch
                assert slots == 128
                assert (p.tiles - 1) * p.tile_classes < classes <= p.tiles * p.tile_classes
                assert 1 <= p.splits <= p.tiles
                assert p.blocks * p.splits <= p.blocks + 8 * programs <= MOST_PROGRAMS
                assert p.chunk % p.tile_classes == 0
                assert min(classes, 2048 // centers) <= p.chunk <= min(classes, 131072 // centers) + p.tile_classes
                # What a row kernel launches for the rows of a chunk, at least a row a program.
                assert p.chunk * centers <= MOST_PROGRAMS


def busy(tiles, blocks, splits, programs):
    """The part of a sweep's time that its multiprocessors have a tile to work on."""
    waves = -(-blocks * splits // programs)
    return tiles * blocks / (programs * waves * -(-tiles // splits))


BATCHES = (1, 128, 256, 384, 512, 640, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("centers", [1, 3])
def test_multiprocessors_are_busy(device, operands, centers):
    """In both sweeps; at few tiles, not many more than multiprocessors, it could not be."""
    programs, l2 = DEVICES[device]
    for batch in BATCHES:
        p = plan(batch, 512, 10**6, centers, operands, programs, cache_for_chunk(l2 << 20))
        tiles = p.chunk // p.tile_classes
        assert busy(p.tiles, p.blocks, p.splits, programs) >= 0.9, batch
        assert busy(tiles, p.blocks, splits_of(tiles, p.blocks, programs), programs) >= 0.9, batch


def test_splits():
    assert plan(512, 512, 10**6).splits == 132 // 4  # one wave is full
    assert plan(1, 512, 300).splits == 3  # no more than tiles
    assert plan(1, 512, 0).splits == 1
    assert plan(1, 512, 128 * 140).splits == 70  # 132 parts would not end sooner
    assert plan(8192, 512, 10**6, programs=108).splits > 1  # 64 blocks alone would leave 44 idle


def test_chunks_of_sub_centers_have_no_more_rows():
    for centers in (1, 2, 16):
        few, many = (plan(batch, 512, 10**6, centers).chunk * centers for batch in (1, 10**6))
        assert 100000 < few <= 131072
        assert many <= 4096


def test_chunks_stay_in_the_cache():
    assert [cache_for_chunk(mb << 20) for mb in (6, 48, 126)] == [2 << 20, 16 << 20, 32 << 20]
    p = plan(512, 512, 10**7)
    assert p.chunk * 512 * 2 <= 16 << 20
    assert plan(512, 512, 10**7, operands="fp32").chunk * 512 * 4 <= 16 << 20


def test_launches_at_30_million_classes():
    """The real operators on a weight whose rows are one row in memory: every launch has one axis, within its limit."""
    classes, dim, batch = 3 * 10**7, 8, 2
    x, w = torch.randn(batch, dim), torch.randn(1, dim).expand(classes, dim)
    scale, args = torch.full((batch,), 30.0), torch.zeros(0)
    spec = Spec(num_classes=classes, want=int(Want.DX), backend="cuda", compute_dtype=torch.bfloat16)
    launched = []

    def run(name, text, grid, threads, argument, smem, buffers):
        launched.append((name, grid, threads))

    with emulated(None, run, programs=132):
        red, *_ = ops.sweep(x.requires_grad_(), w, torch.tensor([0, classes - 1]), scale, None, None, None, args, spec)
        torch.autograd.grad(red.sum(), x)
    check_launches(launched, chunks_of(classes))


def chunks_of(classes):
    """Of a few rows."""
    return -(-classes // plan(1, 8, classes).chunk)


def check_launches(launched, gradients):
    assert sum("gradient" in name for name, *_ in launched) == gradients
    for name, grid, threads in launched:
        assert 1 <= grid[0] <= MOST_PROGRAMS, name
        assert grid[1:] == (1, 1), name
        assert threads <= 1024, name


def test_launches_of_an_update_of_30_million_classes():
    """Two calls; the rows of each are worked on before the first weight changes."""
    classes, launched = 3 * 10**7, []
    step = draw("sgd", batches=(2, 3), classes=10, dim=8, operands=torch.bfloat16)
    calls = [c._replace(bias=None) for c in step.calls]
    spec, w = step.spec._replace(num_classes=classes), torch.randn(1, 8).expand(classes, 8)

    def run(name, text, grid, threads, argument, smem, buffers):
        launched.append((re.search(r"3gpu\d+([a-z_]+?)_kernel", name)[1], grid, threads))

    with emulated(None, run, programs=132):
        step._replace(w=w, calls=calls, spec=spec).run()
    chunks = chunks_of(classes)
    check_launches(launched, 2 * chunks)
    of_chunk = ["gradient", "finish_weights", "gradient", "update_weights"]
    assert [name for name, *_ in launched] == 2 * ["backward_rows", "prologue"] + chunks * of_chunk


@pytest.mark.parametrize("far", ["w", "x"])
def test_offsets_beyond_31_bits(far, monkeypatch):
    """Five rows in a storage of more than 2^31 elements, of which only those rows are touched."""
    dim, rows, distance = 20, 5, 2**29 + 2**20
    g = torch.Generator().manual_seed(0)
    given = {n: torch.randn(rows, dim, generator=g).bfloat16() for n in ("x", "w")}
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # which would touch it all
    storage = torch.empty((rows - 1) * distance + dim, dtype=torch.bfloat16)
    there = given | {far: storage.as_strided((rows, dim), (distance, 1)).copy_(given[far])}
    labels, found = torch.tensor([4, 0, 4, 2, 3]), []
    for tensors in (given, there):
        x, w = (tensors[n].detach().requires_grad_() for n in ("x", "w"))
        with simulated(seed=1):
            loss = fm.functional.margin_cross_entropy(x, w, labels, fm.CosFace(0.3), backend="cuda")
            found.append([loss, *torch.autograd.grad(loss, (x, w))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_offsets_of_a_state_beyond_31_bits(monkeypatch):
    """The last row of a momentum of more than 2^31 numbers, of which no other row is touched."""
    rows, dim, update = 2**15 + 1, 2**16, Update("sgd", 0.5, momentum=0.9)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    w, m, grad = torch.zeros(1, dim).expand(rows, dim), torch.empty(rows, dim), torch.randn(1, dim)
    m[-1] = 1
    with simulated(seed=1):
        cuda.update_rows(w, State(m), torch.tensor([rows - 1]), grad, update)
    torch.testing.assert_close(m[-1:], 0.9 + grad)
    torch.testing.assert_close(w[:1], -0.5 * m[-1:])
