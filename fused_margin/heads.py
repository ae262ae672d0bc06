"""The head as a module: owns the class weights, and the margin's parameters where they are tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .margins import ArcFace, Margin, RowParameter, as_margin
from .spec import EPS


class MarginHead(nn.Module):
    """A classification head with a margin softmax: embeddings and labels in, loss out.

    Equivalent to: `margin_cross_entropy(embeddings, self.weight, labels, margin, scale=scale, ...)`, see there for the
    meaning of the options.

    Args:
        embedding_size: D.
        num_classes: C.
        margin: a margin of the library, or a function of the target cosines. Tensors in it become buffers of the head
            (parameters stay parameters), so that they follow `.to(...)` and stand in the state_dict.
        scale: s; "norm" takes each embedding's norm (A-Softmax).
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
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device, dtype=dtype)) if bias else None
        self._margin = ArcFace() if margin is None else as_margin(margin)
        self._margin_tensors = {name: "margin_" + name.replace(".", "_") for name in self._margin.tensors()}
        for name, tensor in self._margin.tensors().items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self._margin_tensors[name], tensor)
            else:
                self.register_buffer(self._margin_tensors[name], tensor)
        self.reset_parameters()

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
        x, w = embeddings.to(self.weight.dtype), self.weight
        if self.options["normalize_embeddings"]:
            x = F.normalize(x, dim=1, eps=EPS)
        if self.options["normalize_weight"]:
            w = F.normalize(w, dim=1, eps=EPS)
        scale = embeddings.norm(dim=1, keepdim=True) if self.scale == "norm" else self.scale
        return F.linear(x, w) * scale + (0 if self.bias is None else self.bias)

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(cosines, class numbers), both [B, k]: the nearest classes, in one sweep, without a tensor of B x C."""
        return functional.topk(embeddings, self.weight, k, self.options["compute_dtype"])

    def extra_repr(self) -> str:
        parts = [f"embedding_size={self.embedding_size}", f"num_classes={self.num_classes}", f"margin={self._margin}"]
        return ", ".join([*parts, f"scale={self.scale}"])
