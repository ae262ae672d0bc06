"""Samples: every target is in, the number is fixed, other classes are equally likely, nothing waits for a device."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_margin as fm
from fused_margin.partial_fc.sampling import hard, mixed, sample_size, stratified, uniform

DRAWS = {"stratified": stratified, "uniform": uniform}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def check(index, targets, rows, count):
    assert len(index) == count
    assert bool((index.diff() > 0).all())
    assert int(index[0]) >= 0
    assert int(index[-1]) < rows
    assert torch.isin(targets[targets < rows], index).all()


@pytest.mark.parametrize("draw", DRAWS)
def test_targets_are_in_and_the_rest_is_distinct(draw):
    for seed in range(300):
        g = generator(seed)
        rows = int(torch.randint(1, 60, (), generator=g))
        count = int(torch.randint(1, rows + 1, (), generator=g))
        targets = torch.randint(rows, (count,), generator=g)
        targets[torch.rand(count, generator=g) < 0.3] = rows  # of another shard
        check(DRAWS[draw](targets, rows, count, g), targets, rows, count)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("targets", [range(40, 50), [49] * 10, [0, 49], []])
def test_targets_that_crowd_one_block(draw, targets):
    """As many targets as there are places, all of one or two blocks, or none at all."""
    targets = torch.tensor([*targets, 50], dtype=torch.int64)
    for seed in range(30):
        check(DRAWS[draw](targets, 50, 10, generator(seed)), targets, 50, 10)


@pytest.mark.parametrize("draw", DRAWS)
def test_every_rival_is_as_likely(draw):
    rows, count, turns = 60, 12, 6000
    targets = torch.tensor([3, 4, 5, 41, rows])  # three of one block: others give up their draw
    hits = torch.zeros(rows)
    for seed in range(turns):
        hits[DRAWS[draw](targets, rows, count, generator(seed))] += 1
    rivals = torch.ones(rows, dtype=torch.bool)
    rivals[targets[:-1]] = False
    expected = hits[rivals].mean()
    spread = (expected * (1 - expected / turns)) ** 0.5
    assert (hits[rivals] - expected).abs().max() < 4.5 * spread
    assert torch.equal(hits[targets[:-1]], torch.full((4,), float(turns)))


def test_hard_are_the_nearest():
    g = generator(0)
    x, w, k = torch.randn(9, 8, generator=g), torch.randn(40 * 3, 8, generator=g), 3
    targets = torch.tensor([7, 7, 39, 40, 40, 2, 40, 40, 40])
    index = hard(targets, 12, x, w, k)
    check(index, targets, 40, 12)
    score = F.linear(F.normalize(x), F.normalize(w)).unflatten(1, (40, k)).amax((0, 2))
    score[targets[targets < 40]] = 9
    assert torch.equal(index, score.topk(12).indices.sort().values)


@pytest.mark.parametrize("draw", DRAWS)
def test_waits_for_no_device(draw):
    """Under fake tensors, whatever would read a value of a tensor raises."""
    g = generator(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        targets = torch.empty(6, dtype=torch.int64)
        assert DRAWS[draw](targets, 50, 10, g).shape == (10,)
        assert hard(targets, 10, torch.empty(6, 4), torch.empty(50, 4), 1).shape == (10,)


def test_sizes():
    assert sample_size(1000, 0.1, 20) == 100
    assert sample_size(1000, 0.1, 300) == 300  # all rows may have targets of their own here
    assert sample_size(200, 0.1, 300) == 200
    assert sample_size(0, 0.1, 300) == 0
    assert sample_size(1001, 0.1, 1) == 101


def test_seeds_differ():
    seeds = {mixed(s, k, step, rank) for s in range(4) for k in range(3) for step in range(20) for rank in range(8)}
    assert len(seeds) == 4 * 3 * 20 * 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def samples(head, steps):
    found, x, y = [], torch.zeros(3, 4), torch.tensor([1, 5, 90])
    for _ in range(steps):
        loss = head(x, y)
        loss.backward()
        found.append(head.weight.grad.coalesce().indices()[0].tolist())
        head.weight.grad = None
    return found


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_reproducible_and_in_the_state(sampling):
    def make(seed=7):
        return fm.PartialFC(4, 100, sample_rate=0.1, sampling=sampling, seed=seed)

    first = samples(make(), 6)
    assert samples(make(), 6) == first
    assert samples(make(8), 6) != first
    assert len({tuple(s) for s in first}) == 6
    head = make()
    samples(head, 3)
    other = make(1)
    other.load_state_dict(head.state_dict())
    assert samples(other, 3) == first[3:]
    assert head.eval().step == 3
    head(torch.zeros(1, 4), torch.tensor([1]))
    assert head.step == 3


def as_it_is(head):
    return head


def assigned(head):
    head.load_state_dict({name: t.clone() for name, t in head.state_dict().items()}, assign=True)
    return head


def replaced(head):
    head.weight = torch.nn.Parameter(torch.randn(100, 4), requires_grad=head.weight.requires_grad)
    return head


def from_meta(_):
    head = fm.PartialFC(4, 100, sample_rate=0.1).to("meta").to_empty(device="cpu")
    head.reset_parameters()
    return head


def unpickled(head):
    return pickle.loads(pickle.dumps(head))


@pytest.mark.parametrize("made", [unpickled, copy.deepcopy, assigned, replaced])
def test_a_frozen_head_can_be_copied(made):
    head = made(fm.PartialFC(4, 100, sample_rate=0.1, bias=True).requires_grad_(False))
    assert head(torch.randn(3, 4), torch.tensor([1, 5, 90])).isfinite()


@pytest.mark.parametrize("made", [as_it_is, copy.deepcopy, unpickled, assigned, replaced, from_meta])
def test_the_gradient_is_marked_as_coalesced(made):
    """Of copies too, and of another parameter in the weight's place; else each step of an optimizer would sort."""
    head = made(fm.PartialFC(4, 100, sample_rate=0.1))
    for _ in range(2):  # the second one adds up, rows of two samples
        head(torch.randn(3, 4), torch.tensor([1, 5, 90])).backward()
        assert head.weight.grad.is_coalesced()
        assert (head.weight.grad.indices()[0].diff() > 0).all()


def test_a_dense_gradient_on_request():
    """Any optimizer, then: rows that were not swept have gradient 0."""
    torch.manual_seed(0)
    dense = fm.PartialFC(4, 100, scale=4.0, sample_rate=0.1, sparse_grad=False)
    sparse = fm.PartialFC(4, 100, scale=4.0, sample_rate=0.1)
    x, y = torch.randn(3, 4), torch.tensor([1, 5, 90])
    for head in (dense, sparse):
        head(x, y).backward()
    assert torch.equal(dense.weight.grad, sparse.weight.grad.to_dense())
    before = dense.weight.detach().clone()
    torch.optim.AdamW([dense.weight], weight_decay=0).step()
    moved = (dense.weight != before).any(1)
    assert moved.sum() == 10
    with pytest.raises(RuntimeError, match="sparse"):
        torch.optim.AdamW([sparse.weight]).step()
