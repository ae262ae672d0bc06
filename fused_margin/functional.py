"""The head as a function: checks the input once, builds T and tau, calls the sweep, reduces."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, inputs, ops, rows
from .angles import softplus
from .backends import BACKENDS, choose
from .margins import Margin, Outcome, RowParameter, RowStats, as_margin, gather_rows
from .margins.forms import Forms, forms_of
from .rows import Mining
from .rules import IDENTITY, RULES
from .scales import ScaleRule
from .shard import ALL_CLASSES, Shard
from .spec import EPS, Aux, Rows, Spec, Want, acc_dtype

_TOPK_CHUNK = 16_384  # classes whose cosines exist at one time in `topk`


class Stats(NamedTuple):
    """What one sweep knows beside the loss; no gradient.

    An ignored row has the values of an embedding of zeros whose target is no class.
    """

    target_cosine: Tensor  # [B]
    best_rival_cosine: Tensor  # [B], with bias / scale where there is a bias; -inf where there is no rival
    lse: Tensor  # [B]: log-sum-exp of all logits, the target's with its margin; without softmax, see `Margin.reduction`
    correct: Tensor  # 0-dim int64: rows whose target has the largest logit, without margin; ignored rows do not count
    hard_rivals: Tensor  # [B]: rivals beyond the margin's threshold; 0 where it has none


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin | Callable[[Tensor], Tensor],
    *,
    scale: RowParameter | str | ScaleRule | None = None,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mining: Mining | None = None,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    sub_centers: int = 1,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
    return_stats: bool = False,
    shard: Shard = ALL_CLASSES,
) -> Tensor | tuple[Tensor, Stats]:
    """Softmax cross-entropy with a margin on the target, without a tensor of batch x classes.

    Equivalent to (for a margin without rival rule; T is `margin.target`)::

        cos = F.linear(F.normalize(embeddings), F.normalize(weight))
        cos_y = cos[range(B), labels]
        logits = scale * cos.index_put((range(B), labels), T(cos_y)) + bias
        loss = F.cross_entropy(logits, labels, class_weight, ignore_index=ignore_index, reduction=reduction)

    but for two cases where `F.cross_entropy` gives nan: the mean over no valid row (an empty batch, all rows ignored)
    is 0, with gradient 0.

    Args:
        embeddings: [B, D], float32, bfloat16, float16 or float64. Not normalised: that is part of the sweep.
        weight: [C, D], one row a class; keep it float32 in mixed precision. float64 goes with float64 only.
        labels: [B], int64 (or another integer type): class numbers, or `ignore_index`. On the CPU a label outside
            [0, C) is an error; on a GPU it is not looked at (that would wait for the device).
        margin: a margin of the library, or a function that maps the target cosines [B] to [B].
        scale: s, the inverse temperature: a positive number; a tensor [B] per sample, [C] per class or 0-dim, with
            gradient if it asks for one; "norm", the norm of each embedding (A-Softmax); or a rule, as `fm.AdaCos`.
            None: `margin.default_scale`, that of the loss's paper or code, 64 for most (docs/losses.md has them all);
            1 where embeddings or weight are not normalised.
        bias: [C], added to the logits (plain softmax).
        reduction: "mean" over the rows that are not ignored, "sum", or "none": [B], with 0 in ignored rows.
        label_smoothing: eps in [0, 1): the target distribution is (1 - eps) one-hot + eps / C, on the logits with
            margin, as F.cross_entropy has it; with class_weight, whose weight of the row's class is that of the whole
            row here, and of each class in the smoothed part there.
        mining: `fm.Focal` or `fm.HardRows`: a weight for each row by its own cross-entropy. A penalty that the margin
            adds (MagFace's of the norm) is neither looked at nor weighted by it.
        sample_weight, class_weight: [B] and [C], multiplied with the rows' losses (their smoothed part too); the mean
            is over the weights.
        sub_centers: K: `weight` is [C * K, D], K consecutive rows a class, whose cosine is the largest of theirs.
        normalize_embeddings, normalize_weight: False takes raw rows, so that "cosines" are products. With a margin
            of angles both must be True.
        compute_dtype: dtype of the operands of the matrix products; by default the autocast dtype, else the
            embeddings'. Sums, cosines, logits and the loss are float32 in any case (float64 for float64). The CPU
            backend computes float16 operands in float32.
        backend: "cpu", "reference", or None: the first one that can run this input.
        return_stats: also return `Stats`, from the same sweep.
        shard: what `fm.PartialFC` passes, whose `weight` and `bias` hold some of the classes only.

    Returns:
        The loss, float32 (float64 for float64 embeddings): 0-dim, or [B] with reduction "none"; with `return_stats`
        the pair (loss, Stats).

    Raises:
        TypeError, ValueError: what was got, what is expected, what to do. RuntimeError: a label out of range.
    """
    margin = as_margin(margin)
    inputs.check_tensors(embeddings, weight, labels, bias, sub_centers, shard)
    inputs.check_fit(margin, normalize_embeddings, normalize_weight, bias, sub_centers)
    rows.check_reduction(reduction)
    scale = inputs.scale_of(scale, margin, normalize_embeddings, normalize_weight)
    rows.check_extras(label_smoothing, mining, margin.softmax)
    inputs.check_weights("sample_weight", sample_weight, len(labels), "row")
    inputs.check_weights("class_weight", class_weight, shard.count(weight, sub_centers), "class")
    inputs.check_options(ignore_index, normalize_embeddings, normalize_weight)
    spec = Spec(
        rule=margin.rule().name,
        unit_slope=margin.gradient == "detached",
        reduction=margin.reduction,
        sub_centers=sub_centers,
        normalize_x=normalize_embeddings,
        normalize_w=normalize_weight,
        compute_dtype=_compute_dtype(compute_dtype, embeddings),
        num_classes=shard.count(weight, sub_centers),
        ignore_index=ignore_index,
    )
    spec = spec._replace(backend=choose(backend, embeddings, weight, spec, type(margin).__name__))
    head = _Inputs(embeddings, weight, labels.long(), spec, shard)
    extras = rows.Extras(reduction, label_smoothing, mining, sample_weight, class_weight)
    forms = _forms(head, margin, scale, bias, extras)
    if forms is not None:
        loss, stats = _by_kernel(head, margin, forms, scale, extras, return_stats)
    else:
        loss, stats = _by_torch(head, margin, scale, bias, extras, return_stats)
    return (loss, stats) if return_stats else loss


def why_not(
    backend: str,
    margin: Margin | Callable[[Tensor], Tensor] | None = None,
    embeddings: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    sub_centers: int = 1,
) -> list[str]:
    """Why the backend cannot run, in words: at all, this margin, on these tensors. An empty list means that it can.

    Arguments are those of `margin_cross_entropy`, each as far as it is known: `fm.why_not("cpu", fm.SFace())` says
    which rule of its rivals no kernel has, and how one is asked for.
    """
    spec, loss = Spec(sub_centers=sub_centers), ""
    if margin is not None:
        margin = as_margin(margin)
        spec, loss = spec._replace(rule=margin.rule().name), type(margin).__name__
    if embeddings is not None:
        spec = spec._replace(compute_dtype=_compute_dtype(compute_dtype, embeddings))
    elif compute_dtype is not None:
        spec = spec._replace(compute_dtype=compute_dtype)
    return backends.why_not(backend, embeddings, weight, spec, loss)


class _Inputs(NamedTuple):
    """What every step of a call needs."""

    x: Tensor
    w: Tensor
    labels: Tensor  # int64
    spec: Spec
    shard: Shard

    @property
    def valid(self) -> Tensor:
        """[B] bool: not ignored."""
        return self.labels != self.spec.ignore_index


def _forms(
    head: _Inputs, margin: Margin, scale: RowParameter | str | ScaleRule, bias: Tensor | None, extras: rows.Extras
) -> Forms | None:
    """What the backend's own kernel for the work on [B] needs; None where PyTorch does that work."""
    plain = bias is None and not extras.smoothing and not isinstance(scale, (str, ScaleRule))
    plain = plain and head.shard.whole
    return forms_of(margin) if plain and hasattr(BACKENDS[head.spec.backend], "sweep_loss") else None


def _by_kernel(
    head: _Inputs, margin: Margin, forms: Forms, scale: RowParameter, extras: rows.Extras, stats: bool
) -> tuple[Tensor, Stats | None]:
    """The loss, of a margin that kernels know: everything up to the rows' losses is one operator."""
    x, w, labels, spec, _ = head
    s = row_scale(scale, x, labels, spec.num_classes)
    spec = spec._replace(want=_want(x, w, s, stats, margin, extras.smoothing))
    reduction = "none" if extras.weigh else extras.reduction
    loss, of_rows, aux = ops.sweep_loss(x, w, labels, s, margin.rule().tensor(x), spec, forms, reduction)
    if extras.weigh:
        loss = rows.reduced(loss, labels, head.valid, spec.num_classes, extras, loss)
    if not stats:
        return loss, None
    found = Rows(*of_rows)
    out = Outcome(s, s * margin.target(found.cos_y), found.red, found.red)
    return loss, _stats(head, out, Aux(*aux), found.cos_y, 0.0)


def _by_torch(
    head: _Inputs,
    margin: Margin,
    scale: RowParameter | str | ScaleRule,
    bias: Tensor | None,
    extras: rows.Extras,
    return_stats: bool,
) -> tuple[Tensor, Stats | None]:
    """The loss, of any margin: the work on [B] is PyTorch's, slopes are autograd's."""
    x, w, labels, spec, shard = head
    found = _row_stats(head, margin, scale)
    margin = _prepared(head, margin, found)
    s = _scale_at_rows(head, scale, found)
    extra_bias = margin.bias()
    bias = bias if extra_bias is None else shard.part(extra_bias, spec.num_classes)
    spec = spec._replace(rule=margin.rule().name, want=_want(x, w, s, return_stats, margin, extras.smoothing))
    out, margin, stats = _sweep(head._replace(spec=spec), margin, s, bias, found, return_stats)
    loss = margin.row_loss(out)
    by = softplus(out.red - out.z) if extras.mining is not None and margin.softmax else loss  # what mining looks at
    loss = rows.smoothed(loss, out, margin, extras.smoothing, shard.swept(spec))
    return rows.reduced(loss, labels, head.valid, spec.num_classes, extras, by, margin.penalty()), stats


def _prepared(head: _Inputs, margin: Margin, found: RowStats) -> Margin:
    """The margin of the batch. The backend was chosen by the rule that the margin says before; it may be another."""
    made = margin.prepare(found, head.labels)
    spec = head.spec._replace(rule=made.rule().name)
    if spec.rule != head.spec.rule and (reasons := backends.why_not(spec.backend, spec=spec, loss=type(made).__name__)):
        raise ValueError(
            f"{type(margin).__name__}.prepare() made a margin that backend={spec.backend!r} cannot run: "
            f"{', '.join(reasons)}. Define rule() of {type(margin).__name__} too, or pass backend='reference'"
        )
    return made


def _row_stats(head: _Inputs, margin: Margin, scale: RowParameter | str | ScaleRule) -> RowStats:
    """What the margin and the scale need to know before the sweep."""
    x, w, labels, spec, shard = head
    acc, valid = acc_dtype(x), head.valid
    of_scale = scale.needs if isinstance(scale, ScaleRule) else ("norm",) if isinstance(scale, str) else ()
    needs = {*margin.needs, *of_scale}
    cos_y = norm = weight_norm = None
    if "cos_y" in needs or RULES[spec.rule].needs_tau:
        cos_y = shard.target_cosine(x, w, labels, spec)
    if "norm" in needs:
        norm = torch.linalg.vector_norm(torch.where(valid[:, None], x, 0), dim=1, dtype=acc)
    if "weight_norm" in needs:
        weight_norm = shard.weight_norm(w, labels, valid, acc)
    return RowStats(valid, spec.num_classes, acc, cos_y, norm, weight_norm)


def _scale_at_rows(head: _Inputs, scale: RowParameter | str | ScaleRule, found: RowStats) -> Tensor:
    """s [B], in the accumulation dtype."""
    if isinstance(scale, ScaleRule):

        def rivals(s: Tensor) -> Tensor:
            """log sum_j exp(s c_j) of each row, without gradient."""
            plain = head.spec._replace(rule="identity", reduction="logsumexp", want=Want.NONE)
            args = IDENTITY.tensor(head.x)
            with torch.no_grad():
                s = s.expand(len(head.x))
                return head.shard.sweep(head.x, head.w, head.labels, s, None, None, args, plain)[0]

        return scale.prepare(found, rivals).expand(len(head.x))
    if isinstance(scale, str):
        return found.norm
    return row_scale(scale, head.x, head.labels, head.spec.num_classes)


def _sweep(
    head: _Inputs, margin: Margin, scale: Tensor, bias: Tensor | None, found: RowStats, stats: bool
) -> tuple[Outcome, Margin, Stats | None]:
    """The sweep itself, and the target's logit; also the margin as its rows have it."""
    x, w, labels, spec, shard = head
    rule, at_rows, tau = margin.rule(), margin.at(labels, spec.num_classes, found.dtype), None
    if RULES[rule.name].needs_tau:
        with torch.no_grad():
            tau = at_rows.threshold(found.cos_y.clone())  # it may be a user's, and work in place
    red, cos_y, sum_u, aux = shard.sweep(x, w, labels, scale, tau, bias, rule.tensor(x), spec)
    aux = Aux(*aux)
    if "hard_mean" in margin.needs:
        at_rows = at_rows.after(aux.masked_sum / aux.masked_count.clamp_min(1))
    c = cos_y.clone() if stats else cos_y  # T may be a user's, and work in place
    z = scale * inputs.checked_target(at_rows.transform(c), cos_y).to(found.dtype)
    own = 0.0
    if bias is not None:
        own = shard.at_rows(bias, labels, head.valid).to(found.dtype)
        z = z + own
    out = Outcome(scale, z, red, sum_u)
    return out, at_rows, _stats(head, out, aux, cos_y, own) if stats else None


@torch.no_grad()
def _stats(head: _Inputs, out: Outcome, aux: Aux, cos_y: Tensor, own: Tensor | float) -> Stats:
    """own: the bias at the rows' targets, [B]."""
    correct = (head.valid & (cos_y + own / out.scale >= aux.best)).sum()
    hard = aux.masked_count if RULES[head.spec.rule].needs_tau else torch.zeros_like(out.red)
    lse = torch.logaddexp(out.red, out.z) if head.spec.reduction == "logsumexp" else out.red
    return Stats(cos_y.detach(), aux.best, lse.detach(), correct, hard)


def topk(
    embeddings: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    normalize_embeddings: bool = True,
    normalize_weight: bool = True,
    compute_dtype: torch.dtype | None = None,
    sub_centers: int = 1,
) -> tuple[Tensor, Tensor]:
    """The k classes with the largest cosines, in one sweep over the weights and without a tensor of B x C.

    Equivalent to: `torch.topk(F.linear(F.normalize(embeddings), F.normalize(weight), bias), k)`, with operands rounded
    to `compute_dtype`, and products in float32 (float64 for float64).
    With sub_centers K, a class is K consecutive rows of `weight`, and its cosine the largest of theirs.
    Returns: cosines [B, k] in falling order, and class numbers [B, k] (int64). No gradient.
    """
    inputs.check_tensors(embeddings, weight, None, bias, sub_centers)
    classes = weight.shape[0] // sub_centers
    k = inputs.checked_k(k, classes)
    dtype, acc = _compute_dtype(compute_dtype, embeddings), acc_dtype(embeddings)

    def operand(rows: Tensor, normalize: bool) -> Tensor:
        rows = F.normalize(rows.to(acc), dim=1, eps=EPS) if normalize else rows
        return rows.to(dtype).to(acc)

    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
        x_hat = operand(embeddings, normalize_embeddings)
        best, ids = x_hat.new_empty(len(x_hat), 0), x_hat.new_empty(len(x_hat), 0, dtype=torch.long)
        for first in range(0, classes, _TOPK_CHUNK):
            last = min(first + _TOPK_CHUNK, classes)
            cos = F.linear(x_hat, operand(weight[first * sub_centers : last * sub_centers], normalize_weight))
            cos = cos.unflatten(1, (-1, sub_centers)).amax(2) if sub_centers > 1 else cos
            cos = cos if bias is None else cos + bias[first:last].to(acc)
            here, place = cos.topk(min(k, cos.shape[1]))
            best, ids = torch.cat([best, here], 1), torch.cat([ids, place + first], 1)
            best, place = best.topk(min(k, best.shape[1]))
            ids = ids.gather(1, place)
    return best, ids


def row_scale(scale: RowParameter, embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """s as a tensor [B] of the accumulation dtype."""
    acc = acc_dtype(embeddings)
    if isinstance(scale, Real):
        return embeddings.new_full(embeddings.shape[:1], float(scale), dtype=acc)
    return gather_rows(scale, labels, num_classes, acc, "scale").expand(embeddings.shape[0])


def _compute_dtype(asked: torch.dtype | None, embeddings: Tensor) -> torch.dtype:
    inputs.check_compute_dtype(asked)
    device = embeddings.device.type
    if embeddings.dtype == torch.float64:
        if asked not in (None, torch.float64):
            raise ValueError(f"compute_dtype = {asked} with float64 embeddings; expected None or torch.float64")
        return torch.float64
    if asked is None:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeddings.dtype
    if asked == torch.float64:
        raise ValueError(f"compute_dtype = {asked} with {embeddings.dtype} embeddings; expected embeddings.double()")
    return asked


def _want(embeddings: Tensor, weight: Tensor, scale: Tensor, stats: bool, margin: Margin, smoothing: float) -> int:
    grad = torch.is_grad_enabled()
    wanted = (
        (Want.STATS, stats or "hard_mean" in margin.needs),
        (Want.SUM, smoothing > 0 or "sum_u" in margin.needs),
        (Want.DX, grad and embeddings.requires_grad),
        (Want.DSCALE, grad and scale.requires_grad),
        (Want.DW, grad and weight.requires_grad),
    )
    return sum(flag for flag, asked in wanted if asked)
