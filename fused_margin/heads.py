"""The head as a module: owns the class weights, and the margin's parameters where they are tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, inputs, rows
from .backends import BACKENDS
from .margins import ArcFace, Margin, PerClass, PerSample, RowParameter, as_margin
from .margins.checks import count, flag, tensor
from .rows import Mining
from .scales import ScaleRule
from .spec import EPS, acc_dtype
from .state import KeepsPrecision
from .subcenters import Outliers, find_outliers


class MarginHead(KeepsPrecision):
    """A classification head with a margin softmax: embeddings and labels in, loss out.

    Equivalent to: `margin_cross_entropy(embeddings, self.weight, labels, margin, scale=scale, ...)`, see there for the
    meaning of the options.

    Args:
        embedding_size: D.
        num_classes: C.
        margin: a margin of the library, or a function of the target cosines. Tensors in it become buffers of the head
            (parameters stay parameters), so that they follow `.to(...)` and stand in the state_dict; so does a
            function that is an nn.Module. Buffers are copies, and stay float32 where the head is made 16-bit.
        scale: s, one for all: a number, a 0-dim tensor or parameter, "norm", each embedding's norm (A-Softmax), or a
            rule, as `fm.AdaCos`. None: the margin's `default_scale`, 1 without normalisation.
        bias: a learnable bias per class, for plain softmax.
    The weight [C, D] starts as N(0, 0.01), as InsightFace's: normalised weights turn at a speed of lr / |w|^2, so the
    norm they start with is part of a training recipe.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin | Callable[[Tensor], Tensor] | None = None,
        scale: RowParameter | str | ScaleRule | None = None,
        *,
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
        super().__init__()
        self.embedding_size = count("embedding_size", embedding_size)
        self.num_classes = count("num_classes", num_classes)
        self.sub_centers = count("sub_centers", sub_centers)
        flag("bias", bias)
        inputs.check_options(ignore_index, normalize_embeddings, normalize_weight)
        inputs.check_compute_dtype(compute_dtype)
        self.options = {
            "label_smoothing": label_smoothing,
            "mining": mining,
            "sub_centers": self.sub_centers,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "normalize_embeddings": normalize_embeddings,
            "normalize_weight": normalize_weight,
            "compute_dtype": compute_dtype,
            "backend": backend,
        }
        rows.check_reduction(reduction)
        margin = ArcFace() if margin is None else as_margin(margin)
        if backend is not None and (reasons := functional.why_not(backend, margin, sub_centers=self.sub_centers)):
            raise ValueError(f"backend={backend!r} cannot run: {', '.join(reasons)}; have {', '.join(BACKENDS)}")
        self._make_weight(bias, {"device": device, "dtype": dtype})
        scale = inputs.scale_of(scale, margin, normalize_embeddings, normalize_weight)
        if isinstance(scale, (PerClass, PerSample)) or (isinstance(scale, Tensor) and scale.dim()):
            raise ValueError("a head has one scale for all; for others call functional.margin_cross_entropy")
        if isinstance(scale, Tensor):
            self._hold("scale", scale)
        else:
            self.scale = scale
        inputs.check_weights("class_weight", class_weight, self.num_classes, "class")
        rows.check_extras(label_smoothing, mining, margin.softmax)
        self._hold("class_weight", class_weight)
        self.margin_module = margin.module()  # its parameters and its state are the head's
        if self.margin_module is not None:
            self.margin_module.to(self.weight.device)
        self._margin = None if margin is self.margin_module else self._per_class(margin)
        held = {} if self._margin is None else self._margin.tensors()
        self._margin_tensors = {name: "margin_" + name.replace(".", "_") for name in held}
        for name, value in held.items():
            self._hold(self._margin_tensors[name], value)
        self.reset_parameters()

    def _make_weight(self, bias: bool, options: dict) -> None:
        rows = self.num_classes * self.sub_centers
        self.weight = nn.Parameter(torch.empty(rows, self.embedding_size, **options))
        self.bias = nn.Parameter(torch.zeros(self.num_classes, **options)) if bias else None

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        """A parameter stays the user's, a copy of another tensor becomes a buffer; both on the weight's device."""
        if tensor is None:
            self.register_buffer(name, None)
            return
        moved = tensor.to(self.weight.device)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor if moved is tensor else nn.Parameter(moved.detach()))
        elif tensor.requires_grad:
            raise ValueError(f"{name} asks for a gradient, but no optimizer would see it; expected an nn.Parameter")
        else:
            self.register_buffer(name, moved.detach().clone() if moved is tensor else moved)

    def _per_class(self, margin: Margin) -> Margin:
        """Tensors of one value a class, marked as that: a batch may be as large as there are classes."""

        def mark(name: str, value: RowParameter) -> RowParameter:
            return PerClass(value) if isinstance(value, Tensor) and value.shape == (self.num_classes,) else value

        return margin.map(mark)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        """Takes a PartialFC's too: its weight [C, K * D], and not which classes it draws next."""
        state, name = {k: v for k, v in state.items() if k != prefix + "sampler"}, prefix + "weight"
        given, (rows, dim) = state.get(name), self.weight.shape
        if isinstance(given, Tensor) and given.shape == (self.num_classes, rows // self.num_classes * dim):
            state[name] = given.reshape(rows, dim)
        super()._load_from_state_dict(state, prefix, *rest)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def margin(self) -> Margin:
        """The margin, with the head's own copies of its tensors."""
        if self._margin is None:
            return self.margin_module
        held = {name: getattr(self, attribute) for name, attribute in self._margin_tensors.items()}
        return self._margin.with_tensors(held) if held else self._margin

    def forward(
        self, embeddings: Tensor, labels: Tensor, return_stats: bool = False, *, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, functional.Stats]:
        """The loss; with `return_stats` the pair (loss, functional.Stats). sample_weight: [B]."""
        return functional.margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            self.margin,
            scale=self.scale,
            bias=self.bias,
            return_stats=return_stats,
            sample_weight=sample_weight,
            class_weight=self.class_weight,
            **self.options,
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines [B, C] without margin, for inference; this one does hold B x C numbers.

        Equivalent to: `scale * F.linear(F.normalize(embeddings), F.normalize(weight)) + bias`
        """
        tensor("embeddings", embeddings)
        acc = acc_dtype(self.weight)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, w = embeddings.to(acc), self.weight.to(acc)
            scale = self.scale.value() if isinstance(self.scale, ScaleRule) else self.scale
            if isinstance(scale, str):
                scale = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            if self.options["normalize_embeddings"]:
                x = F.normalize(x, dim=1, eps=EPS)
            if self.options["normalize_weight"]:
                w = F.normalize(w, dim=1, eps=EPS)
            products = F.linear(x, w).unflatten(1, (self.num_classes, self.sub_centers)).amax(2)
            return products * scale + (0 if self.bias is None else self.bias.to(acc))

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(cosines, class numbers), both [B, k]: the nearest classes, in one sweep, without a tensor of B x C.

        With a bias, classes are ranked by their logits, and cosines come with bias / scale.
        """
        if self.bias is not None and isinstance(self.scale, str):
            raise ValueError("topk with a bias and scale='norm' has no one order of the classes; use logits")
        names = ("normalize_embeddings", "normalize_weight", "compute_dtype", "sub_centers")
        scale = self.scale.value() if isinstance(self.scale, ScaleRule) else self.scale
        bias = None if self.bias is None else self.bias.detach() / scale
        return functional.topk(embeddings, self.weight, k, bias=bias, **{name: self.options[name] for name in names})

    def outliers(self, embeddings: Tensor, labels: Tensor, angle: float = 75.0) -> Outliers:
        """For heads with sub-centres: which samples lie `angle` degrees or more from their class's main centre.

        See `fm.find_outliers`. Give it the whole training set's embeddings.
        """
        ignored = self.options["ignore_index"]
        return find_outliers(embeddings, self.weight, labels, self.sub_centers, angle, ignore_index=ignored)

    def extra_repr(self) -> str:
        parts = [f"embedding_size={self.embedding_size}", f"num_classes={self.num_classes}"]
        parts += [f"sub_centers={self.sub_centers}"] * (self.sub_centers > 1)
        parts += [] if self._margin is None else [f"margin={self.margin.map(lambda _, value: _shown(value))}"]
        return ", ".join(parts + ([] if isinstance(self.scale, ScaleRule) else [f"scale={_shown(self.scale)}"]))


def _shown(value: RowParameter | str) -> RowParameter | str:
    """A 0-dim tensor as its number, which a schedule may have changed; anything else as it is."""
    plain = isinstance(value, Tensor) and not value.dim() and not value.is_meta
    return float(f"{value.item():.6g}") if plain else value
