"""Train a network to recognise glyphs, once with a plain PyTorch head and once with the fused head, and compare.

The network sees most characters of the 12 DejaVu text faces, and is then tested as face recognition is: on pairs of
characters that it never saw. Afterwards the two heads alone are timed at 100,000 classes. Shows a table, draws a
picture, and exits with 1 where the two heads disagree.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before torch loads OpenMP, whose waiting threads spin: on a busy machine that makes training ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import torch
    from agreement import Agreement, complaints, early_steps, nudge
    from glyph_data import Glyphs, distort, load_glyphs
    from head_cost import HeadCost, Size, measure
    from losses import LOSSES, Loss
    from report import Results, agreement_text, draw, table
    from torch import Tensor
    from tqdm import tqdm
    from training import Recipe, Run, batches, make_run
    from verification import Verification, verify

    import fused_margin as fm
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"The demo needs {missing.name}, which is not installed. `make demo` sets up everything; "
        "or, in the folder of the repository: pip install -e '.[demo]'"
    ) from None

PROBES = 25  # how often both heads are given the same point


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    recipe: Recipe
    seen: int | None  # classes to train on; None: all that are not held out
    unseen: int  # classes held out for verification
    head: Size


def loss_from(text: str) -> Loss:
    """A loss from its name and optional numbers: "arcface", "arcface:0.5", "combined:1,0.3,0.2"."""
    name, _, numbers = text.partition(":")
    if name not in LOSSES:
        raise argparse.ArgumentTypeError(f"there is no margin {name!r}; choose from {', '.join(LOSSES)}")
    names = LOSSES[name].numbers
    try:
        values = [float(number) for number in numbers.split(",")] if numbers else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers after the colon, as in arcface:0.5") from None
    if len(values) > len(names):
        takes = f"takes {', '.join(names)}" if names else "takes no numbers"
        raise argparse.ArgumentTypeError(f"{text!r} has too many numbers: {name} {takes}")
    loss = Loss(name, dict(zip(names, values, strict=False)))
    try:
        loss.margin(10)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(f"{text!r}: {wrong}") from None
    return loss


def at_least(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` up."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least {low}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """A parser of positive numbers."""
    try:
        if 0 < (number := float(text)) < float("inf"):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}; expected a positive number")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    margins = ", ".join(f"{name}:{','.join(e.numbers)}" if e.numbers else name for name, e in LOSSES.items())
    add = p.add_argument
    add("--margin", type=loss_from, default="arcface", help=f"with or without numbers: {margins} (default: arcface)")
    add("--scale", type=positive, metavar="S", help="scale of the cosines (default: 20, for some losses another)")
    add("--steps", type=at_least(1), metavar="N", help="steps of training (default: 1200; smoke: 60)")
    add("--batch", type=at_least(2), metavar="N", help="images a step (default: 128; smoke: 64)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of weights, images and classes (default: 0)")
    add("--head-classes", type=at_least(2), metavar="N", help="of the timed head (default: 100000; smoke: 5000)")
    add("--threads", type=at_least(1), metavar="N", help="threads of PyTorch (default: one a core)")
    add("--out", type=Path, default="glyphs.png", metavar="FILE", help="the picture, a PNG (default: glyphs.png)")
    add("--smoke", action="store_true", help="the same in seconds, small: does it run, do the heads agree?")
    return p


def plan_from(options: argparse.Namespace) -> Plan:
    """Sizes, by the options."""
    if options.smoke:
        steps, batch, warm_up, seen, unseen, classes, repeats = 60, 64, 0.5, 300, 100, 5_000, 3
    else:
        steps, batch, warm_up, seen, unseen, classes, repeats = 1200, 128, 0.1, None, 300, 100_000, 9
    recipe = Recipe(
        loss=options.margin if options.scale is None else options.margin._replace(scale=options.scale),
        steps=options.steps or steps,
        batch=options.batch or batch,
        warm_up=warm_up,
        seed=options.seed,
    )
    return Plan(recipe, seen, unseen, Size(classes=options.head_classes or classes, repeats=repeats))


def train(glyphs: Glyphs, seen: Tensor, recipe: Recipe) -> Agreement:
    """Train with the plain head, with the fused head, and for a while a nudged twin of the plain one."""
    plain = make_run(recipe, len(seen), backend="reference")
    fused = make_run(recipe, len(seen), backend=None)
    twin = make_run(recipe, len(seen), backend="reference")
    nudge(twin.head.weight)
    agreement = Agreement(plain, fused, twin, early=early_steps(recipe))
    every = math.ceil(recipe.steps / PROBES)
    bar = tqdm(batches(glyphs, seen, recipe), "training", recipe.steps, unit="step", disable=None)
    for step, (images, labels) in enumerate(bar):
        rate = recipe.rate(step)
        embeddings = plain.step(images, labels, rate)
        fused.step(images, labels, rate)
        if step < 2 * recipe.rise:
            twin.step(images, labels, rate)
        if step % every == 0 or step == recipe.steps - 1:
            agreement.probe(embeddings, labels)
            bar.set_postfix_str(f"loss: plain {plain.losses[-1]:.3f}, fused {fused.losses[-1]:.3f}", refresh=False)
    return agreement


def verify_runs(glyphs: Glyphs, unseen: Tensor, seed: int, runs: tuple[Run, ...]) -> list[Verification]:
    """Verification on one distorted image of every face of every unseen class, the same images for all runs."""
    drawings = glyphs.drawings[unseen].flatten(0, 1)
    labels = unseen.repeat_interleave(len(glyphs.faces))
    images = distort(drawings, torch.Generator().manual_seed(seed + 1_000_000))
    return [verify(run.network, images, labels) for run in runs]


def time_heads(size: Size) -> HeadCost:
    """Time and memory of the heads alone."""
    with tqdm(desc=f"heads at {size.classes:,} classes", total=size.repeats + 2, disable=None) as bar:
        return measure(size, bar.update)


def introduce(glyphs: Glyphs, seen: Tensor, unseen: Tensor, recipe: Recipe) -> str:
    """What is going to be done."""
    return (
        f"{glyphs.common:,} characters are in all {len(glyphs.faces)} faces; {glyphs.inkless} have no ink, "
        f"the others make {len(glyphs.drawings):,} classes of distinct drawings.\n"
        f"Training on {len(seen):,} of them, then verifying on {len(unseen)} others: {recipe.loss}, "
        f"{recipe.steps:,} steps of {recipe.batch} images, {torch.get_num_threads()} threads."
    )


def run(plan: Plan, out: Path) -> int:
    """The demo; the exit code."""
    start = time.perf_counter()
    recipe = plan.recipe
    glyphs = load_glyphs()
    order = torch.randperm(len(glyphs.drawings), generator=torch.Generator().manual_seed(recipe.seed))
    unseen, seen = order[: plan.unseen], order[plan.unseen :][: plan.seen]
    print(introduce(glyphs, seen, unseen, recipe), flush=True)

    agreement = train(glyphs, seen, recipe)
    verified = verify_runs(glyphs, unseen, recipe.seed, (agreement.plain, agreement.fused))
    cost = time_heads(plan.head)

    results = Results(glyphs, unseen, recipe, agreement, *verified, cost)
    print(f"\n{agreement_text(agreement)}\n\n{table(results)}\n")
    draw(results, out)
    print(f"{out} shows the curves, the ROC, time and memory. {time.perf_counter() - start:.0f} s in all.", flush=True)
    wrong = complaints(agreement, *verified, cost)
    for sentence in wrong:
        print(f"The heads disagree: {sentence}.", file=sys.stderr)
    if not wrong:
        print("The heads agree: what differs is rounding, which training makes grow.")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """The command."""
    command = parser()
    options = command.parse_args(argv)
    if options.out.is_dir() or not os.access(options.out.resolve().parent, os.W_OK):
        command.error(f"--out {options.out}: expected a file in a folder that exists and can be written to")
    if reasons := fm.why_not("cpu"):
        raise SystemExit(f"The fused head can't run, so there is nothing to compare: {'; '.join(reasons)}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    return run(plan_from(options), options.out)


if __name__ == "__main__":
    sys.exit(main())
