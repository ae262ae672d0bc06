"""Real processes with gloo: DDP's mean, draws, a rank that is killed, ranks that were built differently."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

import fused_margin as fm
from fused_margin import partial_fc
from fused_margin.partial_fc.head import _MARGIN
from fused_margin.partial_fc.sampling import mixed

from ..cases import FP64
from ..error_rule import ErrorRule
from ..test_losses import data, dense
from .sharded import Outcome, together
from .threads import run_threads
from .trainings import ROOT, steps, training
from .worker import DIES_AT, ELASTIC, EVERY, HEADS, batch, network


def start(job, world, folder):
    """The ranks' processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.distributed.worker", job, str(folder)]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=common | {"RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(world)
    ]


def finish(processes, limit=180):
    """What each printed, and how it ended."""
    until, found = time.monotonic() + limit, []
    for process in processes:
        try:
            text = process.communicate(timeout=max(until - time.monotonic(), 1))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0] + "\nTIMED OUT"
        found.append((process.returncode, text))
    return found


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    for code, text in finish(start("equal", 2, folder)):
        assert code == 0, text
    return folder


def test_after_ddp_the_gradient_is_that_of_one_process(equal):
    x, labels = batch()
    for name, make in HEADS.items():
        head, body = make(fm.MarginHead, dtype=torch.float64, backend="reference"), network()
        with torch.no_grad():
            head.weight.copy_(fm.PartialFC(8, 30, dtype=torch.float64).weight)
        head(body(x), labels).backward()
        rule = ErrorRule()
        for rank in range(2):
            averaged = torch.load(equal / f"averaged{rank}", weights_only=True)
            for n, p in body.named_parameters():
                rule.add(n, averaged[f"{name}.{n}"], None, p.grad)
        rule.check()


@pytest.mark.parametrize("name", ELASTIC)
def test_margins_draw_alike_on_all_ranks(equal, name):
    with torch.serialization.safe_globals([Outcome]):
        outcomes = [torch.load(equal / f"{name}{rank}", weights_only=True) for rank in range(2)]
    inputs = data(name, FP64, 0)
    expected = dense(name, FP64, inputs, "exact", torch.float64, seed=mixed(3, _MARGIN, 0))
    rule = ErrorRule()
    rule.add_all(together(outcomes, inputs[1]), None, expected)
    rule.check()


def test_a_rank_is_killed_and_fewer_go_on(tmp_path):
    """The others end with an error, soon; two ranks go on from the last checkpoint of three, with the losses of a
    training that nothing disturbed."""
    processes = start("die", 3, tmp_path)
    processes[1].wait(timeout=180)
    ends = finish(processes, limit=60)  # the timeout is 20 s
    assert ends[1][0] == -9
    for rank in (0, 2):
        code, text = ends[rank]
        assert code == 1, text
        assert "RuntimeError" in text or "DistBackendError" in text or "DistNetworkError" in text, text

    def resume():
        head, optimizer, body = training(seed=3)
        step = int(partial_fc.load(tmp_path / "c", head, optimizer, body)["step"])
        return step, steps(head, optimizer, body, step, 8)

    (step, losses), other = run_threads(2, resume)
    assert step == DIES_AT // EVERY * EVERY
    assert losses == other[1] == pytest.approx(steps(*training(), 0, 8)[step:], rel=1e-5)


DISAGREEMENTS = {
    "num_classes": ({"num_classes": 30}, r"num_classes: 20 on rank 0, 2, 30 on rank 1"),
    "margin": ({"margin": fm.ArcFace(0.4)}, "margin: .*0.5.* on rank 0, 2, .*0.4.* on rank 1"),
    "kind": ({"margin": fm.CosFace()}, "margin: .*ArcFace.* on rank 0, 2, .*CosFace.* on rank 1"),
    "values": ({"margin": fm.ArcFace(torch.full((20,), 0.2))}, "margin"),
    "state": ({"margin": fm.CurricularFace()}, "margin"),
    "dtype": ({"dtype": torch.float64}, "dtype: 'torch.float32' on rank 0, 2, 'torch.float64' on rank 1"),
    "seed": ({"seed": 1}, "seed: 0 on rank 0, 2, 1 on rank 1"),
    "sample_rate": ({"sample_rate": 0.5}, "sample_rate: 1.0 on rank 0, 2, 0.5 on rank 1; sparse_grad"),
    "scale": ({"scale": 30.0}, "scale: 64.0 on rank 0, 2, 30.0 on rank 1"),
    "options": ({"label_smoothing": 0.1}, "label_smoothing"),
    "bias": ({"bias": True, "margin": fm.NormFace()}, "bias"),
    "class weights": ({"class_weight": torch.ones(20)}, "class_weight"),
}


class TestDisagreement:
    """An error on every rank when the head is built."""

    @pytest.mark.parametrize("name", DISAGREEMENTS)
    def test_at_construction(self, name):
        other, match = DISAGREEMENTS[name]
        usual = {"embedding_size": 4, "num_classes": 20, "margin": fm.ArcFace(0.5)}

        def body():
            with pytest.raises(ValueError, match="built alike, and differ in .*" + match):
                fm.PartialFC(**(usual | other if dist.get_rank() == 1 else usual))
            return True

        assert run_threads(3, body) == [True] * 3

    def test_parameters_that_are_drawn_become_those_of_the_first_rank(self):
        def body():
            torch.manual_seed(dist.get_rank())
            return fm.PartialFC(4, 20, fm.AdaMSoftmax(20)).margin_module.m.detach().clone()

        first, *others = run_threads(3, body)
        assert all(torch.equal(first, m) for m in others)

    @pytest.mark.parametrize("what", ["dtype", "sample_weight"])
    def test_in_a_step(self, what):
        def body():
            head = fm.PartialFC(4, 20)
            odd = dist.get_rank() == 1
            x = torch.zeros(2, 4, dtype=torch.bfloat16 if odd and what == "dtype" else torch.float32)
            weight = torch.ones(2) if odd and what == "sample_weight" else None
            with pytest.raises(ValueError, match=f"the ranks differ in the .*{what}"):
                head(x, torch.zeros(2, dtype=torch.long), sample_weight=weight)

        run_threads(3, body)

    @pytest.mark.parametrize("world", [2, 3])
    def test_what_one_rank_refuses(self, world):
        """The others do not wait for it, and the next step is in order."""

        def body():
            head, odd = fm.PartialFC(4, 20), dist.get_rank() == world - 1
            labels = torch.zeros(2, dtype=torch.long)
            for x, wrong, said in (
                (torch.zeros(2, 5), labels, "differ in their last dimension"),
                ([[0.0] * 4] * 2, labels, "got list; expected a tensor"),
                (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long), "labels"),
            ):
                match = said if odd else f"rank {world - 1} was given what the head does not take"
                with pytest.raises((TypeError, ValueError), match=match):
                    head(x if odd else torch.zeros(2, 4), wrong if odd else labels)
            return head(torch.ones(2, 4), labels).detach()

        first, *others = run_threads(world, body)
        assert all(torch.equal(first, loss) for loss in others)

    def test_what_one_rank_refuses_in_topk(self):
        def body():
            head, odd = fm.PartialFC(4, 20), dist.get_rank() == 1
            x = torch.ones(2, 4)
            for wrong, k, said in ((x, 21, "k = 21"), (x[:, :3], 2, "last dimension"), (x.tolist(), 2, "got list")):
                match = said if odd else "rank 1 was given what the head does not take"
                with pytest.raises((TypeError, ValueError), match=match):
                    head.topk(*((wrong, k) if odd else (x, 2)))
            return head.topk(x, 2)[1]

        first, *others = run_threads(3, body)
        assert all(torch.equal(first, ids) for ids in others)


class TestInput:
    def test_labels_out_of_range_raise_on_all_ranks(self):
        def body():
            head = fm.PartialFC(4, 20, sample_rate=0.5)
            labels = torch.tensor([3, 20]) if dist.get_rank() == 1 else torch.tensor([1, 2])
            with pytest.raises(RuntimeError, match=r"labels\[1\] = 20 of rank 1 is outside \[0, 20\)"):
                head(torch.zeros(2, 4), labels)

        run_threads(3, body)

    @pytest.mark.parametrize(
        "options, match",
        [
            ({"sample_rate": 0.0}, r"sample_rate = 0.0; expected a finite number in \[1e-12, 1\]"),
            ({"sample_rate": 1.5}, "sample_rate = 1.5"),
            ({"sampling": "best"}, "sampling = 'best'; expected one of 'stratified', 'uniform', 'hard'"),
            ({"embedding_grad": "mean"}, "embedding_grad = 'mean'; expected one of 'ddp', 'sum'"),
            ({"seed": -1}, "seed = -1; expected an integer, at least 0"),
            ({"max_local_batch": 0}, "max_local_batch = 0"),
            ({"num_classes": 0}, "num_classes = 0"),
            (
                {"margin": fm.LSoftmax(), "sample_rate": 0.5, "scale": 1.0},
                "LSoftmax has no sparse gradient of the weight",
            ),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            fm.PartialFC(**{"embedding_size": 4, "num_classes": 20} | options)

    def test_step(self):
        head = fm.PartialFC(4, 20, max_local_batch=2)
        with pytest.raises(ValueError, match="brings 3 rows; expected at most max_local_batch = 2"):
            head(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match="differ in their last dimension"):
            head(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"sample_weight: got a tensor of shape \[3\]; expected \[2\]"):
            head(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), sample_weight=torch.ones(3))
        with pytest.raises(ValueError, match="k = 21; expected 1 <= k <= 20"):
            head.topk(torch.zeros(2, 4), 21)
        with pytest.raises(RuntimeError, match="topk gives the nearest classes"):
            head.logits(torch.zeros(2, 4))
        with pytest.raises(RuntimeError, match="find_outliers"):
            head.outliers(torch.zeros(2, 4), torch.zeros(2))

    @pytest.mark.parametrize("sampling", ["stratified", "uniform", "hard"])
    def test_no_row_at_all(self, sampling):
        def body():
            head = fm.PartialFC(4, 20, fm.CurricularFace(), sample_rate=0.5, sampling=sampling)
            x = torch.zeros(0, 4, requires_grad=True)
            loss = head(x, torch.zeros(0, dtype=torch.long))
            loss.backward()
            return loss.item(), x.grad.shape

        assert run_threads(3, body) == [(0.0, (0, 4))] * 3

    @pytest.mark.parametrize("most", [None, 6])
    def test_only_one_rank_wants_the_gradient_of_its_embeddings(self, most):
        """The others, one of them without rows, take part in its sum all the same, or it would wait for them."""
        rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        own = torch.tensor([0, 1, 2, 3, 19])

        def body():
            head = fm.PartialFC(4, 20, max_local_batch=most, embedding_grad="sum")
            ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            mine = [slice(0, 5)] if ranks == 1 else [slice(0, 3), slice(3, 5), slice(0, 0)]
            here = mine[torch.distributed.get_rank() if ranks > 1 else 0]
            x = rows[here].clone().requires_grad_(here.start == 0 and here.stop > 0)
            head(x, own[here]).backward()
            return x.grad

        alone = body()
        found = run_threads(3, body)
        assert torch.allclose(found[0], alone[:3], atol=1e-6)
        assert found[1] is None
        assert found[2] is None

    def test_learned_sample_weights(self):
        """Refused, not left without a gradient."""

        def body():
            head = fm.PartialFC(4, 20)
            with pytest.raises(ValueError, match="several ranks do not compute"):
                head(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), sample_weight=torch.ones(1).requires_grad_())

        run_threads(2, body)

    def test_group_without_distributed(self):
        with pytest.raises(ValueError, match="is not initialised"):
            fm.PartialFC(4, 20, process_group=object())
