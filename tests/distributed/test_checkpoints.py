"""Checkpoints: read by another number of ranks, whole after a kill at any moment, refused when damaged or foreign."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import fused_margin as fm
from fused_margin import partial_fc

from .sharded import plain
from .threads import run_threads
from .trainings import ROOT, B, C, D, of_head, on, refuses, steps, training


@pytest.fixture(scope="module")
def undisturbed():
    return steps(*training(), 0, 6)


@pytest.mark.parametrize("before, after", [(3, 2), (2, 3), (3, 1), (1, 2), (2, 5)])
@pytest.mark.parametrize("way", ["checkpoint", "safetensors"])
def test_another_number_of_ranks_goes_on(way, before, after, tmp_path, undisturbed):
    """With the losses of a training that was never interrupted, to rounding (the batches are split otherwise)."""

    def write():
        head, optimizer, network = training()
        losses = steps(head, optimizer, network, 0, 3)
        if way == "checkpoint":
            partial_fc.save(tmp_path / "c", head, optimizer, network, {"epoch": torch.tensor(4)})
        else:
            partial_fc.export_safetensors(tmp_path / "head.safetensors", head, of_head(optimizer, head))
            torch.save(network.state_dict(), tmp_path / f"network{head.ranks.rank}")
            torch.save(optimizer.state_dict(), tmp_path / f"optimizer{head.ranks.rank}")
        return losses

    def read():
        head, optimizer, network = training(seed=9)
        if way == "checkpoint":
            assert partial_fc.load(tmp_path / "c", head, optimizer, network) == {"epoch": torch.tensor(4)}
            return steps(head, optimizer, network, 3, 6)
        own = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        partial_fc.import_safetensors(tmp_path / "head.safetensors", head, own)
        return [plain(own.state[head.weight]["momentum_buffer"]), plain(head.weight.detach()), head.step]

    losses = on(before, write)[0]
    assert losses == pytest.approx(undisturbed[:3], rel=1e-5)
    out = on(after, read)
    if way == "checkpoint":
        assert out[0] == pytest.approx(undisturbed[3:], rel=1e-5)
        return
    head, optimizer, network = training()
    steps(head, optimizer, network, 0, 3)
    for k, expected in enumerate((optimizer.state[head.weight]["momentum_buffer"], head.weight.detach())):
        difference = torch.cat([o[k] for o in out]) - expected
        assert difference.abs().max() < 2e-6 * expected.abs().max()  # sums of numbers as large as any, in another order
    assert [o[2] for o in out] == [3] * after


def test_samples_go_on(tmp_path):
    """A sparse gradient, a plain parameter: the same steps after as before."""

    def run(stop):
        head, optimizer, network = training(0.3, classes=200)
        losses = steps(head, optimizer, network, 0, 3)
        if stop:
            partial_fc.save(tmp_path / "c", head, optimizer, network)
            head, optimizer, network = training(0.3, seed=4, classes=200)
            partial_fc.load(tmp_path / "c", head, optimizer, network)
        return losses + steps(head, optimizer, network, 3, 6)

    assert run_threads(2, lambda: run(True)) == run_threads(2, lambda: run(False))


def test_plain_torch_checkpoint_reshards(tmp_path):
    """torch.distributed.checkpoint alone, on what state_dict gives."""

    def write():
        head, optimizer, network = training(0.3)
        steps(head, optimizer, network, 0, 2)
        dcp.save(head.state_dict(), checkpoint_id=tmp_path / "c")
        return plain(head.weight.detach())

    def read():
        head, _, _ = training(0.3, seed=3)
        state = head.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "c")
        head.load_state_dict(state)
        return plain(head.weight.detach()), head.step

    weights, read_back = run_threads(3, write), run_threads(2, read)
    assert torch.equal(torch.cat(weights), torch.cat([w for w, _ in read_back]))
    assert [step for _, step in read_back] == [2, 2]


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        partial_fc.save(tmp_path / "c", *training())
        return tmp_path / "c"

    def refuse(self, folder, match, **options):
        head, optimizer, network = training(seed=5, **options)
        before = {k: v.clone() for k, v in head.state_dict().items()}
        with pytest.raises(partial_fc.CheckpointError, match=match):
            partial_fc.load(folder, head, optimizer, network)
        assert all(torch.equal(v, head.state_dict()[k]) for k, v in before.items()), "nothing was loaded"
        assert not optimizer.state

    def data(self, folder):
        return next((folder / "00000001").glob("*.distcp"))

    def sign(self, path):
        """Gives a changed file a checksum that fits."""
        manifest = path.parent / "manifest.json"
        content = json.loads(manifest.read_text())
        content["files"][path.name] = partial_fc.checkpoint._checksum(path)
        manifest.write_text(json.dumps(partial_fc.checkpoint._signed(content)))

    def test_cut_off(self, folder):
        path = self.data(folder)
        os.truncate(path, path.stat().st_size - 7)
        self.refuse(folder, r"\.distcp has \d+ bytes, and was written with \d+")

    def test_a_bit_turned(self, folder):
        path = self.data(folder)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.refuse(folder, "is damaged: its checksum differs")

    def test_a_digit_of_the_manifest_turned(self, folder):
        path = folder / "00000001" / "manifest.json"
        content = path.read_text()
        path.write_text(content.replace('"lr": 0.', '"lr": 1.'))
        assert path.read_text() != content
        self.refuse(folder, r"manifest\.json is damaged: its checksum differs")

    def test_metadata_is_checked_before_it_is_parsed(self, folder, monkeypatch):
        path = folder / "00000001" / ".metadata"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        monkeypatch.setattr(partial_fc.checkpoint._Unpickler, "load", lambda self: pytest.fail("parsed"))
        self.refuse(folder, r"\.metadata is damaged: its checksum differs")

    def test_what_the_unpickler_raises(self, folder):
        """With a checksum that fits: bytes of a length that no memory has."""
        path = folder / "00000001" / ".metadata"
        path.write_bytes(b"\x80\x04\x8e" + b"\xff" * 8)
        self.sign(path)
        self.refuse(folder, r"or a damaged one .OverflowError")

    @pytest.mark.parametrize("error", [MemoryError, RuntimeError, IndexError])
    def test_any_error_of_one_rank_is_all_ranks(self, error, folder, monkeypatch):
        once = iter([True])

        def failing(*args):
            if next(once, False):
                raise error("x")

        monkeypatch.setattr(partial_fc.checkpoint, "_check_files", failing)

        def body():
            with pytest.raises(partial_fc.CheckpointError, match=f"rank [01]: no checkpoint .*{error.__name__}: x"):
                partial_fc.load(folder, *training())

        run_threads(2, body)

    def test_a_file_missing(self, folder):
        self.data(folder).unlink()
        self.refuse(folder, "No such file")

    def test_no_checkpoint(self, tmp_path):
        self.refuse(tmp_path, "no checkpoint of this kind")

    def test_foreign(self, folder):
        (folder / "00000001" / "manifest.json").write_text('{"format": "something else"}')
        self.refuse(folder, "has format 'something else'; expected 'fused_margin")

    def test_other_shapes(self, folder):
        self.refuse(folder, rf"head\.\w+ is \[{C}.*\] there, \[30.*\] here", classes=30)

    @pytest.mark.parametrize("what", ["code in the metadata", "bytes in the place of a tensor"])
    def test_runs_no_code(self, folder, what, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        path = folder / "00000001" / ".metadata"
        if what.startswith("code"):
            path.write_bytes(pickle.dumps(Bomb()))
        else:  # torch's own reader would unpickle it
            metadata = pickle.loads(path.read_bytes())
            metadata.state_dict_metadata["head.weight"] = dcp.metadata.BytesStorageMetadata()
            path.write_bytes(pickle.dumps(metadata))
        self.sign(path)
        self.refuse(folder, "system, which no" if what.startswith("code") else "BytesStorageMetadata, which no")
        assert not (tmp_path / "ran").exists()

    def test_all_ranks_refuse_what_one_sees(self, folder):
        path = self.data(folder)
        os.truncate(path, path.stat().st_size - 7)

        def body():
            head, optimizer, network = training()
            with pytest.raises(partial_fc.CheckpointError, match="bytes, and was written with"):
                partial_fc.load(folder, head, optimizer, network)

        run_threads(3, body)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("what", ["groups", "no optimizer", "one rank's groups"])
def test_nothing_is_changed_where_an_optimizer_does_not_fit(what, world, tmp_path):
    def body():
        head, optimizer, network = training()
        steps(head, optimizer, network, 0, 1)
        partial_fc.save(tmp_path / "c", head, None if what == "no optimizer" else optimizer, network)
        head, optimizer, network = training(seed=5)
        if what == "groups" or (what.startswith("one") and head.ranks.rank == 0):
            optimizer = torch.optim.SGD([*head.parameters(), *network.parameters()], lr=0.1, momentum=0.9)
        match = "has no optimizer's state" if what == "no optimizer" else "the optimizer's groups were .*, and are"
        refuses(match, lambda: partial_fc.load(tmp_path / "c", head, optimizer, network), head, optimizer)

    on(world, body)


def an_optimizer(name, head, network):
    kind = getattr(torch.optim, name, None) or getattr(fm.optim, name)
    return kind([*head.parameters(), *network.parameters()], lr=0.1, **({"momentum": 0.9} if "SGD" in name else {}))


class TestOthersThanSaved:
    """What was saved and has no place in what it is loaded into."""

    @pytest.mark.parametrize("way", ["checkpoint", "safetensors"])
    def test_a_bias(self, way, tmp_path):
        saved, other = training(bias=True)[0], training()[0]
        before = other.weight.detach().clone()
        write, read = {
            "checkpoint": (partial_fc.save, partial_fc.load),
            "safetensors": (partial_fc.export_safetensors, partial_fc.import_safetensors),
        }[way]
        write(tmp_path / "c", saved)
        with pytest.raises(partial_fc.CheckpointError, match=r"c\S* has (head\.)?bias, and .* has not: "):
            read(tmp_path / "c", other)
        assert torch.equal(before, other.weight)

    def test_a_network(self, tmp_path):
        """May be left out as a whole, but not in part."""
        head, _, network = training()
        partial_fc.save(tmp_path / "c", head, None, network)
        partial_fc.load(tmp_path / "c", head)
        with pytest.raises(partial_fc.CheckpointError, match=r"has network\.bias, and"):
            partial_fc.load(tmp_path / "c", head, None, torch.nn.Linear(D, D, bias=False))

    @pytest.mark.parametrize("way", ["checkpoint", "safetensors"])
    @pytest.mark.parametrize(
        "before, after, fits",
        [
            ("RowSGD", "RowAdamW", False),
            ("SGD", "RowSGD", True),
            ("RowSGD", "SGD", True),
            ("SGD", "Adam", False),
            ("SGD", "Adagrad", False),
            ("Adagrad", "SGD", False),
            ("Adagrad", "Adagrad", True),
            ("AdamW", "RowAdamW", True),
            ("RowAdamW", "AdamW", False),
        ],
    )
    def test_an_optimizer(self, way, before, after, fits, tmp_path):
        head, _, network = training()
        if way == "safetensors":
            network = torch.nn.Identity()  # a file holds a head alone
        optimizer = an_optimizer(before, head, network)
        x, y = torch.randn(B, D), torch.randint(C, (B,))
        head(network(x), y).backward()
        optimizer.step()
        other = training(seed=5)[0]
        its = an_optimizer(after, other, network)
        if way == "checkpoint":
            partial_fc.save(tmp_path / "c", head, optimizer, network)
            load = lambda: partial_fc.load(tmp_path / "c", other, its, network)  # noqa: E731
        else:
            partial_fc.export_safetensors(tmp_path / "c", head, optimizer)
            load = lambda: partial_fc.import_safetensors(tmp_path / "c", other, its)  # noqa: E731
        weights = other.weight.detach().clone()
        if fits:
            load()
            other(network(x), y).backward()
            its.step()
            return
        of_each = "step of each row" if before == "RowAdamW" else ""
        known = "of other names" if after == "Adagrad" else "momentum_buffer" if after == "SGD" else "exp_avg"
        with pytest.raises(
            partial_fc.CheckpointError, match=f"saved by {before} with .*{of_each}; {after} has .*{known}"
        ):
            load()
        assert torch.equal(weights, other.weight)
        assert after == "Adagrad" or not its.state  # Adagrad's is made with it


def test_a_failure_while_writing_leaves_the_last(tmp_path, monkeypatch):
    head, optimizer, network = training()
    partial_fc.save(tmp_path / "c", head, optimizer, network)
    first = head.weight.detach().clone()
    steps(head, optimizer, network, 0, 1)

    def full(path):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(partial_fc.checkpoint, "sync_folder", full)
        with pytest.raises(partial_fc.CheckpointError, match=r"could not be written .OSError: disk full"):
            partial_fc.save(tmp_path / "c", head, optimizer, network)
    other, optimizer, network = training(seed=3)
    partial_fc.load(tmp_path / "c", other, optimizer, network)
    assert torch.equal(other.weight, first)
    for _ in range(3):
        partial_fc.save(tmp_path / "c", other, optimizer, network)
    kept = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert len(kept) == 3, "two versions and the name of the latest"
    assert kept[-1] == "latest"


@pytest.mark.parametrize("where", ["extra", "network", "optimizer"])
def test_what_is_no_tensor_is_not_saved(where, tmp_path):
    """It could not be loaded, and the last version that can be would be deleted. One rank's is enough."""
    match = {"extra": r"extra\.epoch is int", "network": r"network\._extra_state is str",
             "optimizer": r"optimizer\.head\.weight\.name is str"}[where]  # fmt: skip

    def body():
        head, optimizer, network = training()
        extra = {"epoch": torch.tensor(2)}
        partial_fc.save(tmp_path / "c", head, optimizer, network, extra, keep=1)
        if head.ranks.rank == 0 and where == "extra":
            extra = {"epoch": 3}
        elif head.ranks.rank == 0 and where == "network":
            network.__class__ = type("WithState", (torch.nn.Linear,), {"get_extra_state": lambda self: "x"})
        elif head.ranks.rank == 0:
            optimizer.state[head.weight]["name"] = "x"
        with pytest.raises(TypeError, match=match + r"; .*torch\.tensor\(\.\.\.\)"):
            partial_fc.save(tmp_path / "c", head, optimizer, network, extra, keep=1)
        assert partial_fc.load(tmp_path / "c", *training()) == {"epoch": torch.tensor(2)}

    run_threads(2, body)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["00000001", "latest"], "nothing was written"


SAVER = """
import sys, torch
import fused_margin as fm
head = fm.PartialFC(64, 20000)
optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
head.weight.data.zero_(); head.weight.grad = -torch.ones_like(head.weight)
print("ready", flush=True)
while True:
    head.weight.data += 1
    optimizer.state[head.weight]["momentum_buffer"] = head.weight.detach().clone()
    fm.partial_fc.save(sys.argv[1], head, optimizer)
    print("saved", flush=True)
"""


def test_killed_at_any_moment(tmp_path):
    """One process that only saves, killed three times: what can be loaded is always one whole version."""
    head, last = fm.PartialFC(64, 20000), 0.0
    command = [sys.executable, "-c", SAVER, str(tmp_path / "c")]
    for turn in range(3):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            assert process.stdout.readline() == "saved\n"
            time.sleep(0.05 + 0.037 * turn)
            process.send_signal(signal.SIGKILL)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
        partial_fc.load(tmp_path / "c", head, optimizer)
        values = head.weight.unique()
        assert len(values) == 1
        assert torch.equal(head.weight, optimizer.state[head.weight]["momentum_buffer"])
        last = max(last, values.item())
    assert last >= 1


def test_dist_is_left_alone():
    assert not dist.is_initialized()
