"""Train the demo's network with every loss, and verify: the table of docs/losses.md.

A smaller demo: fewer classes and steps, the fused head only, one seed. It shows that each loss trains, and how far;
with one seed and the papers' margins it does not rank them. `--write docs/losses.md` puts the rows that were run into
the document's table and keeps the others'.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from glyph_data import Glyphs, load_glyphs
from glyphs import verify_runs
from losses import LOSSES, Loss
from torch import Tensor
from tqdm import tqdm
from training import Recipe, batches, make_run
from verification import FARS

COLUMNS = (
    "loss",
    "accuracy",
    *(f"TAR at FAR {far:g}" for far in FARS),
    "seconds",
    "head seconds",
    "threads",
    "last loss",
)
HEADER = "| loss | trained as | accuracy | TAR at FAR 1e-2 | at 1e-3 | training | of it the head | threads |"
CLASSES = 600
NOT_RUN = ("not run", "", "", "", "", "")


def train(name: str, glyphs: Glyphs, seen: Tensor, unseen: Tensor, steps: int, data: list) -> tuple:
    """One row of the table."""
    recipe = Recipe(Loss(name), steps=steps, batch=64)
    run = make_run(recipe, len(seen), backend=None)
    for step, (images, labels) in enumerate(data):
        run.step(images, labels, recipe.rate(step))
    (v,) = verify_runs(glyphs, unseen, recipe.seed, (run,))
    last = sum(run.losses[-20:]) / len(run.losses[-20:])
    threads = torch.get_num_threads()
    return name, v.accuracy, *(v.tar_at[far] for far in FARS), run.seconds, run.head_seconds, threads, last


def cells(line: str) -> list[str]:
    """Of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def merged(text: str, rows: list[tuple]) -> str:
    """The document with these rows in its table of figures; others keep theirs, or say that they were not run."""
    before, found, rest = text.partition(HEADER + "\n")
    if not found:
        raise ValueError(f"no table of figures in the document; expected the line {HEADER}")
    table, _, after = rest.partition("\n\n")
    figures = {line[0].strip("`"): line[2:] for line in map(cells, table.splitlines()[1:])}
    for name, accuracy, *tars, seconds, head, threads, _ in rows:
        times = f"{seconds:.1f} s", f"{head:.2f} s", f"{threads}"
        figures[name] = [*(f"{share:.1%}" for share in (accuracy, *tars)), *times]
    lines = [HEADER, "|---" * len(cells(HEADER)) + "|"]
    for name in LOSSES:
        row = [f"`{name}`", f"`{Loss(name).described(CLASSES)}`", *figures.get(name, NOT_RUN)]
        lines.append(f"| {' | '.join(row)} |")
    return before + "\n".join(lines) + "\n\n" + after


def run_all(names: list[str], options: argparse.Namespace) -> Iterator[tuple]:
    """Train with each, and show a line for each."""
    glyphs = load_glyphs()
    order = torch.randperm(len(glyphs.drawings), generator=torch.Generator().manual_seed(0))
    unseen, seen = order[: options.unseen], order[options.unseen :][: options.classes]
    data = list(batches(glyphs, seen, Recipe(Loss("arcface"), steps=options.steps, batch=64)))
    with options.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name in tqdm(names, "losses", disable=None):
            row = train(name, glyphs, seen, unseen, options.steps, data)
            table.writerow([name, *(f"{v:.4f}" for v in row[1:])])
            file.flush()
            print(f"{name:18}" + "".join(f"{v:10.3f}" for v in row[1:]), flush=True)
            yield row


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="LOSS", help="which (default: all)")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--classes", type=int, default=CLASSES, help=f"to train on (default: {CLASSES})")
    p.add_argument("--unseen", type=int, default=150, help="to verify on (default: 150)")
    p.add_argument("--out", type=Path, default=Path("losses.csv"), help="the table as CSV (default: losses.csv)")
    p.add_argument("--write", type=Path, metavar="FILE", help="a document whose table of figures gets the rows")
    p.add_argument("--no-training", action="store_true", help="with --write: only state anew what each row is")
    options = p.parse_args()
    if unknown := set(options.names) - LOSSES.keys():
        p.error(f"no loss {', '.join(sorted(unknown))}; there are {', '.join(LOSSES)}")
    start, wrong = time.perf_counter(), []
    for row in [None] if options.no_training else run_all(options.names or list(LOSSES), options):
        wrong += [row[0]] if row and not row[1] > 0.7 else []
        if options.write:
            options.write.write_text(merged(options.write.read_text(), [row] if row else []))
    print(f"{time.perf_counter() - start:.0f} s; at or below an accuracy of 70 %: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
