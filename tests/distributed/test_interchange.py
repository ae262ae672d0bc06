"""Weights that come from elsewhere or go there: one safetensors file, heads with other classes, InsightFace's files."""

import json
import os

import pytest
import torch

import fused_margin as fm
from fused_margin import partial_fc

from .sharded import plain
from .threads import run_threads
from .trainings import C, D, of_head, on, refuses, steps, training


def test_state_of_a_margin_head_and_back(tmp_path):
    one = fm.MarginHead(D, C, fm.CurricularFace(), class_weight=torch.rand(C), sub_centers=2, bias=True)

    def load():
        head = fm.PartialFC(D, C, fm.CurricularFace(), class_weight=torch.ones(C), sub_centers=2, bias=True)
        head.seed, head.step = 4, 7
        head.load_state_dict(one.state_dict())
        assert (head.seed, head.step) == (4, 7), "which a MarginHead does not have"
        partial_fc.export_safetensors(tmp_path / "head.safetensors", head)
        return plain(head.weight.detach()).view(-1, D), plain(head.class_weight)

    out = run_threads(3, load)
    assert torch.equal(torch.cat([w for w, _ in out]), one.weight)
    assert torch.equal(torch.cat([w for _, w in out]), one.class_weight)
    tensors, metadata = partial_fc.tensor_file.read(tmp_path / "head.safetensors")
    other = fm.MarginHead(D, C, fm.CurricularFace(), class_weight=torch.ones(C), sub_centers=2, bias=True)
    other.load_state_dict(tensors)
    torch.nn.Sequential(other).load_state_dict({f"0.{name}": t for name, t in tensors.items()})
    other.load_state_dict(tensors | {"weight": tensors["weight"].view(C, 2 * D)})  # as a PartialFC's state_dict has it
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"samplers"'):
        other.load_state_dict(tensors | {"samplers": torch.zeros(2)})
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    assert json.loads(metadata["fused_margin"])["num_classes"] == C


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "what, match",
    [
        (
            "fewer parameters",
            r"state optimizer\.head\.bias\.momentum_buffer is of no parameter .* has head\.weight;",
        ),
        ("a network's parameters", r"^(rank 0: )?2 parameters of the optimizer are not of the head: save and load"),
        ("a buffer's shape", r"margin_module\.t is \[7\]; expected \[\]"),
        ("a state's shape", rf"weight\.momentum_buffer is \[{C}, 3\]; its parameter is \[{C}, {D}\]"),
        ("the sampler's shape", r"sampler is \[3\]; expected \[2\]"),
    ],
)
def test_nothing_is_changed_where_a_file_does_not_fit(what, match, world, tmp_path):
    path = tmp_path / "h"

    def body():
        head, _, _ = training(bias=True)
        own = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        for p in head.parameters():
            own.state[p]["momentum_buffer"] = torch.zeros_like(p)
        partial_fc.export_safetensors(path, head, own)
        tensors = {n: t.clone() for n, t in partial_fc.tensor_file.read(path)[0].items()}
        tensors |= {
            "a buffer's shape": {"margin_module.t": torch.zeros(7)},
            "a state's shape": {"optimizer.weight.momentum_buffer": torch.zeros(C, 3)},
            "the sampler's shape": {"sampler": torch.zeros(3, dtype=torch.int64)},
        }.get(what, {})
        head.ranks.barrier()
        partial_fc.tensor_file.write(path, head.ranks, tensors, {})
        head, _, network = training(seed=5, bias=True)
        parameters = [head.weight] if what == "fewer parameters" else head.parameters()
        if what.startswith("a network"):
            parameters = [*parameters, *network.parameters()]
        own = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        refuses(match, lambda: partial_fc.import_safetensors(path, head, own), head, own)

    on(world, body)


OWNERS = {  # margins that own something for each class
    "adam": lambda classes: fm.AdaMSoftmax(classes, weight=1.0),
    "kappaface": lambda classes: fm.KappaFace(torch.arange(1.0, classes + 1), D),
    "uniface": lambda classes: fm.UniFace(classes, per_class=True),
}


class TestClasses:
    """Classes come and go, with their optimizer's state."""

    @pytest.mark.parametrize("world", [1, 3])
    def test_added_and_dropped(self, world, tmp_path):
        old, optimizer, network = training()
        steps(old, optimizer, network, 0, 2)
        path = tmp_path / "head.safetensors"
        partial_fc.export_safetensors(path, old, of_head(optimizer, old))
        wanted = torch.cat([torch.arange(5, C), torch.tensor([-1, -1, 0])])  # 1 to 4 go, two come, 0 moves

        def body():
            head, _, _ = training(classes=len(wanted), seed=2)
            fresh = plain(head.weight.detach()).clone()
            own = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
            partial_fc.import_safetensors(path, head, own, classes=wanted)
            return fresh, plain(head.weight.detach()), plain(own.state[head.weight]["momentum_buffer"]), head

        out = on(world, body)
        fresh, weight, momentum = (torch.cat([o[i] for o in out]) for i in range(3))
        kept = wanted >= 0
        assert torch.equal(weight[kept], old.weight.detach()[wanted[kept]])
        assert torch.equal(weight[~kept], fresh[~kept])
        assert torch.equal(momentum[kept], optimizer.state[old.weight]["momentum_buffer"][wanted[kept]])
        assert not momentum[~kept].any()
        assert torch.equal(out[0][3].margin_module.t, old.margin_module.t)
        classes = torch.cat([plain(o[3].class_weight) for o in out])
        assert torch.equal(classes[kept], old.class_weight[wanted[kept]])

    @pytest.mark.parametrize("world", [1, 3])
    @pytest.mark.parametrize("margin", OWNERS)
    def test_of_a_margin_that_owns_values_for_each(self, margin, world, tmp_path):
        old = fm.PartialFC(D, C, OWNERS[margin](C))
        optimizer = torch.optim.SGD(old.parameters(), lr=1e-3, momentum=0.9)
        x, labels = torch.randn(6, D), torch.randint(C, (6,))
        for _ in range(2):
            optimizer.zero_grad()
            old(x, labels).backward()
            optimizer.step()
        if margin == "kappaface":
            old.margin_module.observe(x, labels)
        partial_fc.export_safetensors(tmp_path / "h", old, optimizer)
        wanted = torch.cat([torch.arange(2, C), torch.tensor([-1, 0, -1])])

        def body():
            head = fm.PartialFC(D, len(wanted), OWNERS[margin](len(wanted)), seed=2)
            fresh = {n: t.clone() for n, t in head.margin_module.state_dict().items()}
            own = torch.optim.SGD(head.parameters(), lr=1e-3, momentum=0.9)
            partial_fc.import_safetensors(tmp_path / "h", head, own, classes=wanted)
            head(x, labels).backward()
            own.step()  # from the states that were taken over
            return fresh, head, own

        kept = wanted >= 0
        for fresh, head, own in on(world, body):
            assert set(head.margin_module.by_class) <= fresh.keys()
            for name in head.margin_module.by_class:
                now, before = getattr(head.margin_module, name), getattr(old.margin_module, name)
                if isinstance(now, torch.nn.Parameter):
                    momentum = own.state[now]["momentum_buffer"] - now.grad
                    was = optimizer.state[before]["momentum_buffer"]
                    torch.testing.assert_close(momentum[kept], 0.9 * was[wanted[kept]])
                    assert not momentum[~kept].any()
                    now = now + 1e-3 * own.state[now]["momentum_buffer"]
                torch.testing.assert_close(now[kept], before[wanted[kept]])
                torch.testing.assert_close(now[~kept], fresh[name][~kept])

    def test_errors(self, tmp_path):
        head, _, _ = training()
        partial_fc.export_safetensors(tmp_path / "h", head)
        other, _, _ = training(classes=C + 1)
        with pytest.raises(partial_fc.CheckpointError, match=rf"has {C} classes, the head {C + 1}: pass classes"):
            partial_fc.import_safetensors(tmp_path / "h", other)
        with pytest.raises(partial_fc.CheckpointError, match=rf"classes must lie in \[-1, {C}\)"):
            partial_fc.import_safetensors(tmp_path / "h", head, classes=torch.full((C,), C))


class TestTensorFile:
    def write(self, path):
        head, _, _ = training()
        partial_fc.export_safetensors(path, head)
        return head

    @pytest.mark.parametrize("keep", [0, 5, 40, -9])
    def test_cut_off(self, keep, tmp_path):
        head = self.write(tmp_path / "h")
        content = (tmp_path / "h").read_bytes()
        (tmp_path / "h").write_bytes(content[:keep])
        before = head.weight.detach().clone()
        with pytest.raises(partial_fc.CheckpointError):
            partial_fc.import_safetensors(tmp_path / "h", head)
        assert torch.equal(head.weight, before)

    @pytest.mark.parametrize(
        "header",
        [b"[]", b"{", b'{"a": {}}', b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
         b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
         b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
         b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'],
    )  # fmt: skip
    def test_wrong_headers(self, header, tmp_path):
        (tmp_path / "h").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(partial_fc.CheckpointError, match="h"):
            partial_fc.tensor_file.read(tmp_path / "h")

    def test_as_the_safetensors_package_has_it(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch", reason="the safetensors package is not installed")
        head = self.write(tmp_path / "h")
        theirs = safetensors.load_file(tmp_path / "h")
        assert all(torch.equal(theirs[k], v) for k, v in head.state_dict().items())
        safetensors.save_file({k: v.clone() for k, v in theirs.items()}, tmp_path / "theirs")
        other, _, _ = training(seed=8)
        partial_fc.import_safetensors(tmp_path / "theirs", other)
        assert all(torch.equal(v, head.state_dict()[k]) for k, v in other.state_dict().items())


class TestInsightFace:
    def files(self, folder, sizes=(3, 3, 2, 2)):
        weights = [torch.randn(n, D) for n in sizes]
        for rank, w in enumerate(weights):
            state = {"epoch": 3, "state_dict_softmax_fc": {"weight": w}, "state_dict_backbone": {}}
            torch.save(state, folder / f"checkpoint_gpu_{rank}.pt")
        return torch.cat(weights)

    @pytest.mark.parametrize("world", [1, 3, 4])
    def test_another_split(self, world, tmp_path):
        expected = self.files(tmp_path)

        def body():
            head = fm.PartialFC(D, 10)
            partial_fc.load_weight(head, partial_fc.insightface_weights(tmp_path))
            return plain(head.weight.detach()), head.layout.count

        out = on(world, body)
        assert torch.equal(torch.cat([w for w, _ in out]), expected)
        assert world != 4 or [n for _, n in out] == [3, 3, 3, 1]

    def test_a_wrong_split_and_code(self, tmp_path):
        self.files(tmp_path, (3, 2, 3))
        with pytest.raises(partial_fc.CheckpointError, match=r"\[3, 2, 3\] classes, which is no split"):
            partial_fc.insightface_weights(tmp_path)
        (tmp_path / "checkpoint_gpu_1.pt").unlink()
        with pytest.raises(partial_fc.CheckpointError, match="without a gap"):
            partial_fc.insightface_weights(tmp_path)

        class Bomb:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        torch.save({"state_dict_softmax_fc": {"weight": Bomb()}}, tmp_path / "checkpoint_gpu_1.pt")
        with pytest.raises(partial_fc.CheckpointError, match="is damaged"):
            partial_fc.insightface_weights(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_matrices_the_other_way(self):
        w = torch.randn(10, D)

        def body():
            head = fm.PartialFC(D, 10)
            partial_fc.load_weight(head, w.t(), transposed=True)
            with pytest.raises(ValueError, match="they seem to be \\[D, C\\]: transposed=True"):
                partial_fc.load_weight(head, w.t())
            return plain(head.weight.detach())

        assert torch.equal(torch.cat(run_threads(3, body)), w)
