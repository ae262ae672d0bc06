"""A small convolutional network, and what one training of it takes.

The trainings that are compared go side by side, a batch at a time: they see the same images in the same order, and a
busy machine slows all alike.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from glyph_data import Glyphs, distort, text_faces
from losses import Loss
from torch import Tensor, nn

import fused_margin as fm


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    loss: Loss
    steps: int = 1000
    batch: int = 128
    embedding_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warm_up: float = 0.1  # part of the steps in which the learning rate rises
    seed: int = 0

    @property
    def rise(self) -> int:
        """The number of steps in which the learning rate rises."""
        return max(1, round(self.warm_up * self.steps))

    def rate(self, step: int) -> float:
        """The learning rate at a step in parts of the largest: it rises as the cube, then falls as half a cosine."""
        if step < self.rise:
            return ((step + 1) / self.rise) ** 3
        return (1 + math.cos(math.pi * (step - self.rise) / (self.steps - self.rise))) / 2


@dataclass
class Run:
    """One training: a network, a head on top of it, and what was measured."""

    network: nn.Module
    head: fm.MarginHead
    optimizer: torch.optim.Optimizer
    epoch: int  # steps in which as many images are seen as there are drawings
    term: Callable[[Tensor, Tensor], Tensor] | None = None  # a loss of (embeddings, labels) that is added
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    head_seconds: float = 0.0

    def step(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """One step of training; returns the embeddings. The head's seconds are those of its forward and backward."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        features = self.network(images)
        embeddings = features.detach().requires_grad_()
        torch.manual_seed(len(self.losses))  # some margins are drawn: for all heads alike
        head_start = time.perf_counter()
        loss = self.head(embeddings, labels)
        if self.term:
            loss = loss + self.term(embeddings, labels)
        loss.backward()
        self._observe(embeddings, labels)
        self.head_seconds += time.perf_counter() - head_start
        features.backward(embeddings.grad)
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item())
        return embeddings.detach()

    def _observe(self, embeddings: Tensor, labels: Tensor) -> None:
        """KappaFace's margins follow the embeddings that it is shown, from one end of an epoch to the next."""
        margin = self.head.margin
        if isinstance(margin, fm.KappaFace):
            margin.observe(embeddings, labels)
            if (len(self.losses) + 1) % self.epoch == 0:
                margin.end_epoch()


def block(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def make_network(embedding_size: int) -> nn.Module:
    """Images [B, 1, 32, 32] to embeddings [B, embedding_size]."""
    network = nn.Sequential(
        block(1, 32, kernel=5, stride=2),
        block(32, 64, kernel=3, stride=2),
        block(64, 64, kernel=3, stride=1),
        block(64, 128, kernel=3, stride=2),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, embedding_size, bias=False),
        nn.BatchNorm1d(embedding_size),
    )
    return network.to(memory_format=torch.channels_last)


def make_run(recipe: Recipe, num_classes: int, backend: str | None) -> Run:
    """A training at its start. The initial weights depend on the seed alone."""
    if backend is None and not recipe.loss.has_kernel(num_classes):  # asked before the seed: it may draw a margin
        backend = "reference"
    torch.manual_seed(recipe.seed)
    network = make_network(recipe.embedding_size)
    head = fm.MarginHead(
        embedding_size=recipe.embedding_size,
        num_classes=num_classes,
        backend=backend,
        **recipe.loss.head(num_classes),
    )
    optimizer = torch.optim.SGD(
        [{"params": [*network.parameters(), *head.parameters()], "initial_lr": recipe.learning_rate}],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    epoch = math.ceil(num_classes * len(text_faces()) / recipe.batch)
    return Run(network, head, optimizer, epoch, recipe.loss.term(num_classes))


def batches(glyphs: Glyphs, classes: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, 1, 32, 32] and labels [B] of every step, decided by the seed; a label is a place in `classes`."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.steps):
        labels = torch.randint(len(classes), [recipe.batch], generator=generator)
        faces = torch.randint(len(glyphs.faces), [recipe.batch], generator=generator)
        images = distort(glyphs.drawings[classes[labels], faces], generator)
        yield images.to(memory_format=torch.channels_last), labels
