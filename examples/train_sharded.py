"""Train the demo's glyphs with the classes split over processes, and verify on characters that were never seen.

    torchrun --nproc-per-node=2 examples/train_sharded.py      # or: python examples/train_sharded.py
    torchrun --nproc-per-node=4 examples/train_sharded.py --sample-rate 0.3 --checkpoint runs/glyphs --resume

The batch of a step is the same for any number of processes, each has its part of it; the network has no batch norm,
which would see another batch in each process. So one process and two train alike, but for rounding.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads OpenMP, whose waiting threads spin

import torch
import torch.distributed as dist
from glyph_data import Glyphs, distort, load_glyphs
from losses import LOSSES, Loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import Recipe, batches, make_network
from verification import Verification, verify

import fused_margin as fm
from fused_margin import partial_fc

UNSEEN = 300  # classes held out for verification


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--margin", choices=LOSSES, default="arcface", help="one of the demo's losses (default: arcface)")
    add("--steps", type=int, default=400, metavar="N")
    add("--batch", type=int, default=128, metavar="N", help="images a step, of all processes together (default: 128)")
    add("--classes", type=int, metavar="N", help="train on that many (default: on all but those held out)")
    add("--sample-rate", type=float, default=1.0, metavar="R", help="part of the classes in a step (default: 1)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="save there")
    add("--every", type=int, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add("--resume", action="store_true", help="go on from the checkpoint, with any number of processes")
    add("--out", type=Path, metavar="FILE", help="losses and verification, as JSON")
    return p


def without_batch_norm(network: nn.Module) -> nn.Module:
    """The network with norms of single samples in the place of its batch norms."""
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(8, module.num_features))
        elif isinstance(module, nn.BatchNorm1d):
            setattr(network, name, nn.LayerNorm(module.num_features))
        else:
            without_batch_norm(module)
    return network


class Training:
    """A network on every process, a head split over them, and one optimizer for both."""

    def __init__(self, recipe: Recipe, num_classes: int, sample_rate: float) -> None:
        torch.manual_seed(recipe.seed)  # the same network everywhere
        self.recipe, self.step = recipe, 0
        self.network = without_batch_norm(make_network(recipe.embedding_size))
        self.head = fm.PartialFC(
            recipe.embedding_size,
            num_classes,
            sample_rate=sample_rate,
            sparse_grad=False,  # torch.optim.SGD then moves all classes in each step
            seed=recipe.seed,
            **recipe.loss.head(num_classes),
        )
        several = self.head.ranks.world > 1
        self.model = DistributedDataParallel(self.network) if several else self.network  # the head stays outside
        parameters = [*self.network.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, recipe.learning_rate, recipe.momentum, weight_decay=5e-4)

    def train_step(self, images: Tensor, labels: Tensor) -> float:
        """One step on this process's part of the batch; the loss of the whole batch."""
        rank, world = self.head.ranks.rank, self.head.ranks.world
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self.recipe.rate(self.step)
        self.optimizer.zero_grad()
        embeddings = self.model(images.tensor_split(world)[rank])
        loss = self.head(embeddings, labels.tensor_split(world)[rank])
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def save(self, folder: Path) -> None:
        partial_fc.save(folder, self.head, self.optimizer, self.network, {"step": torch.tensor(self.step)})

    def load(self, folder: Path) -> None:
        self.step = int(partial_fc.load(folder, self.head, self.optimizer, self.network)["step"])


def check_unseen(network: nn.Module, glyphs: Glyphs, unseen: Tensor, seed: int) -> Verification:
    """Verification on one distorted image of every face of every unseen class."""
    drawings, labels = glyphs.drawings[unseen].flatten(0, 1), unseen.repeat_interleave(len(glyphs.faces))
    return verify(network, distort(drawings, torch.Generator().manual_seed(seed + 1_000_000)), labels)


def train(training: Training, glyphs: Glyphs, seen: Tensor, options: argparse.Namespace, say: Callable) -> list[float]:
    """The losses of the steps that were left."""
    losses, start = [], time.perf_counter()
    for step, (images, labels) in enumerate(batches(glyphs, seen, training.recipe)):
        if step < training.step:
            continue  # before the checkpoint
        losses.append(training.train_step(images, labels))
        if training.step % 50 == 0:
            seconds = (time.perf_counter() - start) / len(losses)
            say(f"step {training.step:4}: loss {losses[-1]:.4f}, {seconds:.3f} s a step")
        if options.checkpoint and (training.step % options.every == 0 or training.step == options.steps):
            training.save(options.checkpoint)
    return losses


def run(options: argparse.Namespace) -> None:
    loss = Loss(options.margin, {})
    recipe = Recipe(loss=loss, steps=options.steps, batch=options.batch)
    glyphs = load_glyphs()
    order = torch.randperm(len(glyphs.drawings), generator=torch.Generator().manual_seed(recipe.seed))
    unseen, seen = order[:UNSEEN], order[UNSEEN:][: options.classes]
    training = Training(recipe, len(seen), options.sample_rate)
    ranks = training.head.ranks
    say = print if ranks.rank == 0 else lambda text: None
    say(f"{len(seen):,} classes on {ranks.world} processes ({training.head.layout.count:,} on the first), {loss}")
    if options.resume:
        training.load(options.checkpoint)
        say(f"goes on after step {training.step}")
    losses = train(training, glyphs, seen, options, say)
    if ranks.rank == 0:
        found = check_unseen(training.network, glyphs, unseen, recipe.seed)
        print(f"verification on {len(unseen)} unseen classes: accuracy {found.accuracy:.4f}", flush=True)
        if options.out:
            options.out.write_text(json.dumps({"losses": losses, "accuracy": found.accuracy}))
    ranks.barrier()


def main(argv: list[str] | None = None) -> None:
    """The command."""
    command = parser()
    options = command.parse_args(argv)
    if options.resume and not options.checkpoint:
        command.error("--resume needs --checkpoint FOLDER")
    several = "RANK" in os.environ  # torchrun started this
    if several:
        dist.init_process_group("gloo")
    try:
        run(options)
    finally:
        if several:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
