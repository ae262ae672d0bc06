"""The head with its classes split over the ranks of a process group; each step may sweep a sample of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import functional, inputs
from ..heads import MarginHead
from ..margins import Margin, PerSample, RowParameter
from ..margins.checks import choice, count, number
from ..rows import Mining
from ..scales import ScaleRule
from ..state import recomputing
from .batch import Batch, gather_batch, refuse
from .describe import described
from .layout import Layout, LocalRows, check_agreement, local_part, sharded
from .ranks import Amplify, Own, Ranks, Replicate
from .sampling import SAMPLINGS, hard, mixed, sample_size, stratified, uniform
from .shard import RankShard

EMBEDDING_GRADS = ("ddp", "sum")
_INIT_ROWS = 4096  # classes whose first weights one seed gives, so that they do not depend on the number of ranks
_INIT, _SAMPLE, _MARGIN = range(3)  # what random numbers are for


class PartialFC(MarginHead):
    """A margin head whose classes are split over ranks, and of which a step sweeps a sample.

    Equivalent to, for any number of ranks and sample_rate 1: `fm.MarginHead(...)` on the rows of all ranks in one
    process, on the order of the ranks. With a sample: the same on the sampled classes alone. Every rank gets the same
    loss. Without `torch.distributed` it is one shard.

    Args, beside those of `fm.MarginHead` (all ranks must give the same, which is checked):
        sample_rate: part of the classes that takes part in a training step, in (0, 1]: every class that is a target,
            and rivals. At least as many of a shard as the batch of all ranks has rows. In eval mode all do.
        sampling: "stratified" (a random rival in each of equal blocks of classes), "uniform", or "hard" (those nearest
            to an embedding of the batch, found by one more sweep).
        sparse_grad: the weight's gradient is a sparse tensor of the swept rows, for `fm.optim.RowSGD`,
            `fm.optim.RowAdamW` or torch's optimizers that take one, and `weight` a plain parameter [C_local, D]; else
            it is dense, and `weight` on several ranks a DTensor [C, D], for any optimizer. None: where sample_rate < 1.
        embedding_grad: what this rank's embeddings get. "ddp": the gradient of the loss times the number of ranks, so
            that after DDP's mean over the ranks the network has the gradient of one process on the whole batch. "sum":
            the gradient of the loss, for those who add up the ranks' parameter gradients.
        seed: of the first weights, of the samples, and (on several ranks) of what a margin draws.
        process_group: default: all ranks. max_local_batch: the most rows that a rank brings; then the ranks do not tell
            one another how many they have, which on a GPU waits for the device.

    A margin's values for each class, `class_weight` and `bias` are split as the weight is; give them whole [C]. Margins
    that own values for each class (AdaMSoftmax, KappaFace, UniFace with per_class) keep them whole on each rank. With
    sub_centers K, `weight` is [C, K * D].
    Do not wrap it in DDP: its parameters differ between ranks, and those that do not get the same gradient on each.
    Source: An et al. 2022, Killing two birds with one stone: Partial FC (arXiv 2203.15565).
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin | Callable[[Tensor], Tensor] | None = None,
        scale: RowParameter | str | ScaleRule | None = None,
        sample_rate: float = 1.0,
        *,
        sampling: str = "stratified",
        sparse_grad: bool | None = None,
        embedding_grad: str = "ddp",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        max_local_batch: int | None = None,
        bias: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        mining: Mining | None = None,
        class_weight: Tensor | None = None,
        sub_centers: int = 1,
        normalize_embeddings: bool = True,
        normalize_weight: bool = True,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        number("sample_rate", sample_rate, 1e-12, 1, "a part of the classes")
        choice("sampling", sampling, SAMPLINGS)
        choice("embedding_grad", embedding_grad, EMBEDDING_GRADS)
        self.seed, self.step = count("seed", seed, 0), 0
        self.max_local_batch = None if max_local_batch is None else count("max_local_batch", max_local_batch)
        self.ranks = Ranks(process_group)
        self.layout = Layout(count("num_classes", num_classes), self.ranks.world, self.ranks.rank)
        self.sample_rate, self.sampling, self.embedding_grad = float(sample_rate), sampling, embedding_grad
        self.sparse_grad = sample_rate < 1 if sparse_grad is None else bool(sparse_grad)
        self._swept_rows = 0  # of the last step
        self.sharded_names: set[str] = set()  # parameters and buffers that hold this rank's rows of [C, ...]
        super().__init__(
            embedding_size,
            num_classes,
            margin,
            scale,
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            mining=mining,
            class_weight=class_weight,
            sub_centers=sub_centers,
            normalize_embeddings=normalize_embeddings,
            normalize_weight=normalize_weight,
            compute_dtype=compute_dtype,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if self.sparse_grad and "weight_norm" in self.margin.needs:
            raise ValueError(f"{type(self.margin).__name__} has no sparse gradient of the weight: sparse_grad=False")
        check_agreement(self.ranks, described(self))
        for name, t in [*self.named_parameters(), *self.named_buffers()]:
            if name not in self.sharded_names:
                self.ranks.from_first(t.data)  # drawn at random, perhaps

    def _make_weight(self, bias: bool, options: dict) -> None:
        columns = self.sub_centers * self.embedding_size
        self._add_rows("weight", nn.Parameter(torch.empty(self.layout.count, columns, **options)))
        if bias:
            self._add_rows("bias", nn.Parameter(torch.zeros(self.layout.count, **options)))
        else:
            self.bias = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also where `load_state_dict(assign=True)` or a user puts another parameter in the place of the weight."""
        super().register_parameter(name, param)
        if name == "weight" and param is not None:
            self._watch_weight()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # a copy's parameters have no hooks
        self._watch_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialFC:
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight is not before:  # as after to_empty() of a head on meta
            self._watch_weight()
        return self

    def _watch_weight(self) -> None:
        if self.sparse_grad and self.weight.requires_grad:  # a frozen one takes no hook
            self.weight.register_post_accumulate_grad_hook(self._mark_coalesced)

    def _add_rows(self, name: str, local: Tensor) -> None:
        """A parameter or buffer that holds this rank's rows."""
        self.sharded_names.add(name)
        if not isinstance(local, nn.Parameter):
            self.register_buffer(name, local)
        elif self.sparse_grad or self.ranks.world == 1:
            self.register_parameter(name, local)
        else:
            shown = sharded(local.detach(), self.layout, self.ranks)
            self.register_parameter(name, nn.Parameter(shown, requires_grad=local.requires_grad))

    @property
    def class_names(self) -> set[str]:
        """Parameters and buffers with a row for each class: what is split, and the margin's own, which are not."""
        own = () if self.margin_module is None else self.margin_module.by_class
        return self.sharded_names | {f"margin_module.{name}" for name in own}

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None or tensor.shape != (self.num_classes,):
            super()._hold(name, tensor)
            return
        part = self.layout.part(tensor.detach()).to(self.weight.device, copy=True)
        if isinstance(tensor, nn.Parameter):
            part = nn.Parameter(part)
        elif tensor.requires_grad:
            super()._hold(name, tensor)  # raises
        self._add_rows(name, part)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The first weights, N(0, 0.01), of the seed: the same for any number of ranks (of one kind of device)."""
        local, first, last = self._rows("weight"), self.layout.first, self.layout.last
        for block in range(first // _INIT_ROWS, -(-last // _INIT_ROWS)):
            generator = _generator(local.device, self.seed, _INIT, block)
            begin = block * _INIT_ROWS
            drawn = torch.empty(_INIT_ROWS, local.shape[1], dtype=local.dtype, device=local.device)
            drawn.normal_(std=0.01, generator=generator)
            inside = slice(max(first, begin), min(last, begin + _INIT_ROWS))
            local[inside.start - first : inside.stop - first] = drawn[inside.start - begin : inside.stop - begin]
        if self.bias is not None:
            self._rows("bias").zero_()

    def _mark_coalesced(self, weight: nn.Parameter) -> None:
        """Autograd's accumulation forgets that the rows of one step are sorted and distinct; coalesce() would sort."""
        if weight.grad.is_sparse and weight.grad._nnz() == self._swept_rows:
            weight.grad._coalesced_(True)

    def _rows(self, name: str) -> Tensor:
        """This rank's rows of a parameter or buffer, without gradient."""
        return local_part(getattr(self, name).detach(), self.layout)

    def forward(
        self,
        local_embeddings: Tensor,
        local_labels: Tensor,
        return_stats: bool = False,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, functional.Stats]:
        """The loss of the rows of all ranks, the same on each of them; with reduction "none" those of this rank's rows.

        With `return_stats` the pair (loss, functional.Stats): [b] of this rank's rows, `correct` of all ranks' rows.
        local_embeddings [b, D], local_labels [b], sample_weight [b]: ranks may bring different numbers of rows, in each
        step anew, and none at all.
        """
        with self._or_refuse(self.max_local_batch):
            self._check_input(local_embeddings, local_labels, sample_weight)
        ignored = self.options["ignore_index"]
        labels = local_labels.long()
        batch = gather_batch(self.ranks, local_embeddings, labels, sample_weight, self.max_local_batch, ignored)
        self._check_labels(batch)
        x, rows = local_embeddings, local_embeddings
        if self.ranks.world > 1:
            rows = local_embeddings.to(functional.acc_dtype(local_embeddings))
            if batch.learns and not rows.requires_grad:  # as where a rank has no rows: the others wait for its share
                rows = rows.detach().requires_grad_()
            rows = Amplify.apply(rows, self.ranks.world if self.embedding_grad == "ddp" else 1)
            x = Replicate.apply(rows, batch.x, batch.start)
        with self._same_draws():
            return self._loss(batch, x, rows, return_stats)

    def _loss(
        self, batch: Batch, x: Tensor, rows: Tensor, return_stats: bool
    ) -> Tensor | tuple[Tensor, functional.Stats]:
        w = LocalRows.apply(self.weight, self.embedding_size)
        shard = self._shard(batch, rows, w)
        valid = batch.labels != self.options["ignore_index"]
        margin, class_weight = self._at_rows(shard, batch.labels, valid)
        weights = [t for t in (batch.sample_weight, class_weight) if t is not None]
        out = functional.margin_cross_entropy(
            x,
            w,
            batch.labels,
            margin,
            scale=self.scale,
            bias=None if self.bias is None else self._with_gradient("bias"),
            return_stats=return_stats,
            sample_weight=torch.stack(weights).prod(0) if weights else None,
            shard=shard,
            **self.options,
        )
        if self.training and not recomputing():
            self.step += 1
        loss, stats = out if return_stats else (out, None)
        if self.options["reduction"] == "none" and self.ranks.world > 1:
            loss = Own.apply(loss, batch)
        if not return_stats:
            return loss
        return loss, functional.Stats(*(t if t.dim() == 0 else batch.own(t) for t in stats))

    def _with_gradient(self, name: str) -> Tensor:
        """This rank's rows [C_local] of a parameter or buffer, through which gradients go back."""
        t = getattr(self, name)
        return LocalRows.apply(t[:, None], 1)[:, 0] if isinstance(t, DTensor) else t

    def _at_rows(self, shard: RankShard, labels: Tensor, valid: Tensor) -> tuple[Margin, Tensor | None]:
        """The margin with its values for each class read at the rows' labels, and the rows' class weights."""
        margin, found = self.margin, {}
        if self._margin is not None:
            found = {n: self._with_gradient(a) for n, a in self._margin_tensors.items() if a in self.sharded_names}
        values = [*found.values(), *([] if self.class_weight is None else [self.class_weight])]
        if not values:
            return margin, None
        dtype = functional.acc_dtype(self.weight)
        fetched = shard.fetch(values, labels, valid, dtype)
        at_rows = dict(zip(found, fetched, strict=False))
        margin = margin.map(lambda name, value: PerSample(at_rows[name]) if name in at_rows else value)
        return margin, None if self.class_weight is None else fetched[-1]

    def _shard(self, batch: Batch, rows: Tensor, w: Tensor) -> RankShard:
        """This step's classes, and where among them the targets are."""
        labels, layout = batch.labels, self.layout
        valid = labels != self.options["ignore_index"]
        here = valid & (labels >= layout.first) & (labels < layout.last)
        target = torch.where(here, labels - layout.first, layout.count)
        sizes = [layout.of(rank).count for rank in range(layout.world)]
        sampled = self.training and self.sample_rate < 1
        if sampled:
            sizes = [sample_size(size, self.sample_rate, len(labels)) for size in sizes]
        count, index = sizes[layout.rank], None
        if count < layout.count:
            index = self._sample(batch, target, count, w, valid)
            place = torch.searchsorted(index, target)
            target = torch.where(here, place, count)
        elif self.sparse_grad and torch.is_grad_enabled():
            index = torch.arange(count, device=labels.device)
        self._swept_rows = count
        position = torch.where(valid, target, -1)
        return RankShard(
            layout, self.ranks, batch, rows, position, index, sum(sizes), self.sub_centers, self.sparse_grad
        )

    def _sample(self, batch: Batch, target: Tensor, count: int, w: Tensor, valid: Tensor) -> Tensor:
        if self.sampling == "hard":
            x = torch.where(valid[:, None], batch.x, 0)
            return hard(target, count, x, w.detach(), self.sub_centers)
        generator = _generator(w.device, self.seed, _SAMPLE, self._this_step(), self.layout.rank)
        draw = {"stratified": stratified, "uniform": uniform}[self.sampling]
        return draw(target, self.layout.count, count, generator)

    def _this_step(self) -> int:
        """The step that runs, also where activation checkpointing runs it again."""
        return self.step - recomputing()

    @contextlib.contextmanager
    def _same_draws(self) -> Iterator[None]:
        """Within, torch's generators give the same numbers on every rank: for margins that draw some."""
        if self.ranks.world == 1 or not self.training:
            yield
            return
        device = self._rows("weight").device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(mixed(self.seed, _MARGIN, self._this_step()))
            yield

    @contextlib.contextmanager
    def _or_refuse(self, capacity: int | None = None) -> Iterator[None]:
        """The other ranks, which wait for this one's rows, are told where the block raises."""
        try:
            yield
        except Exception:
            refuse(self.ranks, capacity, self._rows("weight").device)
            raise

    def _check_input(self, embeddings: Tensor, labels: Tensor, sample_weight: Tensor | None) -> None:
        w = self._rows("weight").view(-1, self.embedding_size)
        inputs.check_tensors(embeddings, w, labels, None, self.sub_centers, _ANY_SHARD)
        most = self.max_local_batch
        if most is not None and len(labels) > most:
            raise ValueError(f"this rank brings {len(labels)} rows; expected at most max_local_batch = {most}")
        inputs.check_weights("sample_weight", sample_weight, len(labels), "row")
        if sample_weight is not None and sample_weight.device != embeddings.device:
            raise ValueError(
                f"sample_weight on {sample_weight.device}; expected {embeddings.device}, as the embeddings"
            )
        if sample_weight is not None and sample_weight.requires_grad and self.ranks.world > 1:
            raise ValueError(
                "sample_weight asks for a gradient, which several ranks do not compute; pass it detached, or learn the "
                "weights in one process"
            )

    def _check_labels(self, batch: Batch) -> None:
        """On the CPU, the labels of all ranks, so that all raise."""
        labels = batch.labels
        if labels.device.type != "cpu":
            return
        bad = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.options["ignore_index"])
        if bad.any():
            row = int(bad.nonzero()[0])
            rank = next(r for r in range(self.ranks.world) if row < sum(batch.sizes[: r + 1]))
            raise RuntimeError(
                f"labels[{row - sum(batch.sizes[:rank])}] = {int(labels[row])} of rank {rank} is outside "
                f"[0, {self.num_classes}) and is not ignore_index = {self.options['ignore_index']}"
            )

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(cosines, class numbers), both [b, k], of this rank's rows over all ranks' classes; all must call it."""
        w = self._rows("weight").view(-1, self.embedding_size)
        with self._or_refuse():
            inputs.check_tensors(embeddings, w, None, None, self.sub_centers, _ANY_SHARD)
            k = inputs.checked_k(k, self.num_classes)
        names = ("normalize_embeddings", "normalize_weight", "compute_dtype", "sub_centers")
        options = {name: self.options[name] for name in names}
        bias = None
        if self.bias is not None:
            if isinstance(self.scale, str):
                raise ValueError("topk with a bias and scale='norm' has no one order of the classes")
            bias = self._rows("bias") / (self.scale.value() if isinstance(self.scale, ScaleRule) else self.scale)
        labels = torch.zeros(len(embeddings), dtype=torch.long, device=embeddings.device)
        batch = gather_batch(self.ranks, embeddings, labels, None, None, -1)
        shape, here = (len(batch.labels), k), min(k, self.layout.count)
        best = torch.full(shape, -torch.inf, dtype=functional.acc_dtype(embeddings), device=embeddings.device)
        ids = torch.zeros(shape, dtype=torch.long, device=embeddings.device)
        if here:
            found = functional.topk(batch.x, w, here, bias=bias, **options)
            best[:, :here], ids[:, :here] = found[0], found[1] + self.layout.first
        best, ids = (self.ranks.gather(t).transpose(0, 1).flatten(1) for t in (best, ids))  # [B, world * k]
        best, place = best.topk(k)
        return batch.own(best), batch.own(ids.gather(1, place))

    def logits(self, embeddings: Tensor) -> Tensor:
        raise RuntimeError("a PartialFC has no logits [B, C], which would be too large: topk gives the nearest classes")

    def outliers(self, embeddings: Tensor, labels: Tensor, angle: float = 75.0) -> functional.Stats:
        raise RuntimeError(
            "export the head (fm.partial_fc.export_safetensors), and call fm.find_outliers on its weight"
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.sharded_names:
            destination[prefix + name] = sharded(destination[prefix + name], self.layout, self.ranks)
        destination[prefix + "sampler"] = torch.tensor([self.seed, self.step])

    def _load_from_state_dict(
        self, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, *rest
    ) -> None:
        """Takes tensors of this rank's rows, of all classes, or DTensors of any number of ranks' layout.

        A MarginHead has no "sampler"; seed and step then stay as they are.
        """
        state = dict(state)
        sampler = state.pop(prefix + "sampler", None)
        if sampler is not None:
            self.seed, self.step = (int(value) for value in sampler)
        for name in self.sharded_names & {n.removeprefix(prefix) for n in state if n.startswith(prefix)}:
            given, mine = state[prefix + name], getattr(self, name)
            if not isinstance(given, DTensor) and name == "weight" and given.shape[0] != self.layout.count:
                given = given.view(-1, self.sub_centers * self.embedding_size)  # a MarginHead's [C * K, D]
            local = local_part(given, self.layout)
            state[prefix + name] = sharded(local, self.layout, self.ranks) if isinstance(mine, DTensor) else local
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *rest)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"sample_rate={self.sample_rate}"]
        parts += [f"sampling={self.sampling!r}"] * (self.sample_rate < 1)
        parts += [
            f"classes={self.layout.first}..{self.layout.last} on rank {self.ranks.rank} of {self.ranks.world}"
        ] * (self.ranks.world > 1)
        return ", ".join(parts)


def _generator(device: torch.device, *seeds: int) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(mixed(*seeds))
    return generator


class _Any(functional.Shard):
    may_be_empty = True


_ANY_SHARD = _Any()
