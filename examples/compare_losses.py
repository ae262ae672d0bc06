"""Train the demo's network with every loss, and verify: the table of docs/losses.md.

A smaller demo: fewer classes and steps, the fused head only, one seed. It shows that each loss trains, and how far;
with one seed and the papers' margins it does not rank them.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
from glyph_data import Glyphs, load_glyphs
from glyphs import verify_runs
from losses import LOSSES, Loss
from torch import Tensor
from tqdm import tqdm
from training import Recipe, batches, make_run
from verification import FARS

COLUMNS = ("loss", "accuracy", *(f"TAR at FAR {far:g}" for far in FARS), "seconds", "head seconds", "last loss")


def train(name: str, glyphs: Glyphs, seen: Tensor, unseen: Tensor, steps: int, data: list) -> tuple:
    """One row of the table."""
    recipe = Recipe(Loss(name), steps=steps, batch=64)
    run = make_run(recipe, len(seen), backend=None)
    for step, (images, labels) in enumerate(data):
        run.step(images, labels, recipe.rate(step))
    (v,) = verify_runs(glyphs, unseen, recipe.seed, (run,))
    last = sum(run.losses[-20:]) / len(run.losses[-20:])
    return name, v.accuracy, *(v.tar_at[far] for far in FARS), run.seconds, run.head_seconds, last


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="LOSS", help="which (default: all)")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--classes", type=int, default=600, help="to train on (default: 600)")
    p.add_argument("--unseen", type=int, default=150, help="to verify on (default: 150)")
    p.add_argument("--out", type=Path, default=Path("losses.csv"), help="the table as CSV (default: losses.csv)")
    options = p.parse_args()
    if unknown := set(options.names) - LOSSES.keys():
        p.error(f"no loss {', '.join(sorted(unknown))}; there are {', '.join(LOSSES)}")
    glyphs = load_glyphs()
    order = torch.randperm(len(glyphs.drawings), generator=torch.Generator().manual_seed(0))
    unseen, seen = order[: options.unseen], order[options.unseen :][: options.classes]
    data = list(batches(glyphs, seen, Recipe(Loss("arcface"), steps=options.steps, batch=64)))
    start, wrong = time.perf_counter(), 0
    with options.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name in tqdm(options.names or list(LOSSES), "losses", disable=None):
            row = train(name, glyphs, seen, unseen, options.steps, data)
            wrong += not row[1] > 0.7
            table.writerow([name, *(f"{v:.4f}" for v in row[1:])])
            file.flush()
            print(f"{name:18}" + "".join(f"{v:10.3f}" for v in row[1:]), flush=True)
    print(f"{time.perf_counter() - start:.0f} s, {options.out}; {wrong} at or below an accuracy of 70 %")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
