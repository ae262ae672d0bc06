"""The head as a module: owns the class weights, and the margin's parameters where they are tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .backends import BACKENDS, why_not
from .margins import ArcFace, CustomMargin, Margin, PerClass, PerSample, RowParameter, as_margin
from .spec import EPS, acc_dtype


class MarginHead(nn.Module):
    """A classification head with a margin softmax: embeddings and labels in, loss out.

    Equivalent to: `margin_cross_entropy(embeddings, self.weight, labels, margin, scale=scale, ...)`, see there for the
    meaning of the options.

    Args:
        embedding_size: D.
        num_classes: C.
        margin: a margin of the library, or a function of the target cosines. Tensors in it become buffers of the head
            (parameters stay parameters), so that they follow `.to(...)` and stand in the state_dict; so does a
            function that is an nn.Module.
        scale: s, one for all: a number, a 0-dim tensor or parameter, or "norm", each embedding's norm (A-Softmax).
        bias: a learnable bias per class, for plain softmax.
    The weight [C, D] starts as N(0, 0.01), as InsightFace's: normalised weights turn at a speed of lr / |w|^2, so the
    norm they start with is part of a training recipe.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin | Callable[[Tensor], Tensor] | None = None,
        scale: RowParameter | str = 64.0,
        *,
        bias: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize_embeddings: bool = True,
        normalize_weight: bool = True,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} = {size!r}; expected a positive integer")
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "normalize_embeddings": normalize_embeddings,
            "normalize_weight": normalize_weight,
            "compute_dtype": compute_dtype,
            "backend": backend,
        }
        functional.check_reduction(reduction)
        if backend is not None and why_not(backend):
            raise ValueError(
                f"backend={backend!r} cannot run: {', '.join(why_not(backend))}; have {', '.join(BACKENDS)}"
            )
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device, dtype=dtype)) if bias else None
        functional.check_scale(scale)
        if isinstance(scale, (PerClass, PerSample)) or (isinstance(scale, Tensor) and scale.dim()):
            raise ValueError("a head has one scale for all; for others call functional.margin_cross_entropy")
        if isinstance(scale, Tensor):
            self._hold("scale", scale)
        else:
            self.scale = scale
        self._margin = self._per_class(ArcFace() if margin is None else as_margin(margin))
        if isinstance(self._margin, CustomMargin) and isinstance(self._margin.fn, nn.Module):
            self.margin_module = self._margin.fn  # its parameters are the head's
        self._margin_tensors = {name: "margin_" + name.replace(".", "_") for name in self._margin.tensors()}
        for name, tensor in self._margin.tensors().items():
            self._hold(self._margin_tensors[name], tensor)
        self.reset_parameters()

    def _hold(self, name: str, tensor: Tensor) -> None:
        """A parameter stays one, another tensor becomes a buffer; both on the weight's device."""
        moved = tensor.to(self.weight.device)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor if moved is tensor else nn.Parameter(moved.detach()))
        elif tensor.requires_grad:
            raise ValueError(f"{name} asks for a gradient, but no optimizer would see it; expected an nn.Parameter")
        else:
            self.register_buffer(name, moved)

    def _per_class(self, margin: Margin) -> Margin:
        """Tensors of one value a class, marked as that: a batch may be as large as there are classes."""

        def mark(name: str, value: RowParameter) -> RowParameter:
            return PerClass(value) if isinstance(value, Tensor) and value.shape == (self.num_classes,) else value

        return margin.map(mark)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def margin(self) -> Margin:
        """The margin, with the head's own copies of its tensors."""
        held = {name: getattr(self, attribute) for name, attribute in self._margin_tensors.items()}
        return self._margin.with_tensors(held) if held else self._margin

    def forward(
        self, embeddings: Tensor, labels: Tensor, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, functional.Stats]:
        """The loss; with `return_stats` the pair (loss, functional.Stats)."""
        return functional.margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            self.margin,
            scale=self.scale,
            bias=self.bias,
            return_stats=return_stats,
            **self.options,
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines [B, C] without margin, for inference; this one does hold B x C numbers.

        Equivalent to: `scale * F.linear(F.normalize(embeddings), F.normalize(weight)) + bias`
        """
        acc = acc_dtype(self.weight)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, w = embeddings.to(acc), self.weight.to(acc)
            scale = torch.linalg.vector_norm(x, dim=1, keepdim=True) if isinstance(self.scale, str) else self.scale
            if self.options["normalize_embeddings"]:
                x = F.normalize(x, dim=1, eps=EPS)
            if self.options["normalize_weight"]:
                w = F.normalize(w, dim=1, eps=EPS)
            return F.linear(x, w) * scale + (0 if self.bias is None else self.bias.to(acc))

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(cosines, class numbers), both [B, k]: the nearest classes, in one sweep, without a tensor of B x C.

        With a bias, classes are ranked by their logits, and cosines come with bias / scale.
        """
        if self.bias is not None and isinstance(self.scale, str):
            raise ValueError("topk with a bias and scale='norm' has no one order of the classes; use logits")
        options = {name: self.options[name] for name in ("normalize_embeddings", "normalize_weight", "compute_dtype")}
        bias = None if self.bias is None else self.bias.detach() / self.scale
        return functional.topk(embeddings, self.weight, k, bias=bias, **options)

    def extra_repr(self) -> str:
        parts = [f"embedding_size={self.embedding_size}", f"num_classes={self.num_classes}", f"margin={self._margin}"]
        return ", ".join([*parts, f"scale={self.scale}"])
