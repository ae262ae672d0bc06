"""docs/partial_fc.md and examples/train_sharded.py do what they say."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import fused_margin as fm
from fused_margin.partial_fc.sampling import stratified

from .trainings import ROOT

GUIDE = ROOT / "docs/partial_fc.md"
TINY = ["--steps", "12", "--batch", "32", "--classes", "200"]


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    scope = {}
    snippets = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, scope)
    assert torch.equal(scope["larger"].weight[:10_000], scope["head"].weight)
    assert scope["extra"] == {"epoch": torch.tensor(3)}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text()):
        assert (GUIDE.parent / target).exists(), target


def example(options, processes=0):
    """The example's output, started as its head says."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, "examples/train_sharded.py", *TINY, *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_example_on_two_processes_as_on_one(tmp_path):
    """The same losses and the same verification; then it goes on from its checkpoint."""
    example(["--out", str(tmp_path / "one"), "--checkpoint", str(tmp_path / "c"), "--every", "6"])
    example(["--out", str(tmp_path / "two")], processes=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=2e-3)


@pytest.mark.slow
def test_example_goes_on_with_fewer_processes(tmp_path):
    folder = ["--checkpoint", str(tmp_path / "c"), "--every", "6"]
    example([*folder, "--out", str(tmp_path / "all"), "--sample-rate", "0.6"])
    for name in ("latest", "00000001", "00000002"):
        assert (tmp_path / "c" / name).exists()
    (tmp_path / "c" / "latest").write_text("00000001")  # that of step 6
    assert "goes on after step 6" in example(
        [*folder, "--resume", "--out", str(tmp_path / "rest"), "--sample-rate", "0.6"]
    )
    whole, rest = (json.loads((tmp_path / name).read_text()) for name in ("all", "rest"))
    assert rest["losses"] == pytest.approx(whole["losses"][6:], rel=1e-6)


@pytest.mark.slow
def test_the_launcher_names_the_rank_that_died(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "-m", "tests.distributed.worker"]
    done = subprocess.run([*command, "die", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert re.search(r"rank\s*:\s*1 \(local_rank: 1\)\s*\n\s*exitcode\s*:\s*-9", done.stderr), done.stderr[-3000:]


def test_100_million_classes_on_64_ranks():
    """Shards, samples and places of targets, without the weights."""
    classes, world, g = 100_000_000, 64, torch.Generator().manual_seed(0)
    layouts = [fm.partial_fc.Layout(classes, world, rank) for rank in range(world)]
    assert layouts[0].first == 0
    assert layouts[-1].last == classes
    assert all(a.last == b.first for a, b in itertools.pairwise(layouts))
    assert {layout.count for layout in layouts} == {1_562_500}
    labels = torch.randint(classes, (8192,), generator=g)
    for layout in (layouts[0], layouts[63]):
        here = (labels >= layout.first) & (labels < layout.last)
        target = torch.where(here, labels - layout.first, layout.count)
        index = stratified(target, layout.count, 156_250, g)
        assert bool((index.diff() > 0).all())
        assert torch.equal(index[torch.searchsorted(index, target[here])], target[here])


@pytest.mark.slow
def test_5_million_classes_train():
    """10 GB of weights, past 2^31 numbers: sampled rows move, the last ones too."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 14e9:
        pytest.skip(f"needs 14 GB of free memory for 5M x 512 weights, {free / 1e9:.0f} GB are there")
    classes = 5_000_000
    head = fm.PartialFC(512, classes, fm.ArcFace(0.3), 16.0, sample_rate=0.01)
    optimizer = fm.optim.RowSGD([head.weight], lr=10.0)
    x, labels = torch.randn(64, 512), torch.randint(classes, (64,))
    labels[:2] = torch.tensor([0, classes - 1])
    before = head.weight.detach()[[0, classes - 1]].clone()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert not torch.equal(head.weight.detach()[[0, classes - 1]], before)
