"""`python -m bench`: measures the head beside what people use today, and keeps the numbers in a CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from . import cases, results, run
from .cases import Case
from .heads import Peers
from .mentions import wrong_mentions
from .methods import METHODS, check_names, compared
from .peers import wrong_insightface
from .results import Row
from .table import summary

EPILOG = """\
Each case: every method's peak memory in a process of its own; then, in one process, the parity gate, and repeats in
turns. An interrupted run goes on where it stopped. The table of the README and the picture are made from the CSV:
python -m bench.table --write README.md docs/performance.md; python -m bench.plot. docs/performance.md explains.
"""
PARTIAL = [".partial", ".csv"]  # ends the name of a file while it is being measured


def _positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"got {text}; expected more than 0")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(METHODS)
    parser.add_argument("--axis", nargs="+", metavar="AXIS", help=f"only these axes: {', '.join(cases.axes())}")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only cases whose name has such a part (* allowed)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"only these: {names}")
    parser.add_argument("--list", action="store_true", help="names of the cases, then stop")
    parser.add_argument("--smoke", action="store_true", help="small cases, two minutes: does everything run?")
    parser.add_argument("--fresh", action="store_true", help="measure the chosen cases anew, even those in the file")
    parser.add_argument("--output", type=Path, help="the CSV (default bench/results/DEVICE.csv for a whole run)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    count, number = _positive(int), _positive(float)
    parser.add_argument("--threads", type=count, default=min(2, torch.get_num_threads()), help="default %(default)s")
    parser.add_argument("--budget", type=number, help="seconds of repeats a method gets in a case (default 3)")
    parser.add_argument("--memory-limit", type=number, metavar="GB", help="of a process (default 0.9 of what is free)")
    parser.add_argument("--insightface", metavar="PATH", help="recognition/arcface_torch of a clone of InsightFace")
    parser.add_argument("--cut-cross-entropy", metavar="PATH", help="a clone, if it is not installed")
    return parser


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    if args.smoke:
        if args.axis:
            raise ValueError("--smoke has cases of its own, without --axis; expected one of the two")
        table = {"smoke": cases.smoke(args.threads, args.device)}
    else:
        table = cases.axes(args.threads, args.device)
    return cases.select(table, args.axis, args.only)


def check_paths(args: argparse.Namespace) -> None:
    """Raises for what would be found out after the first case, or shown as a peer that is not there."""
    if args.insightface and (wrong := wrong_insightface(args.insightface)):
        raise ValueError(f"--insightface: {wrong}")
    if args.cut_cross_entropy and not (Path(args.cut_cross_entropy) / "cut_cross_entropy").is_dir():
        raise ValueError(
            f"--cut-cross-entropy {args.cut_cross_entropy}: there is no folder cut_cross_entropy; expected a clone"
        )
    if args.output and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; expected the name of a CSV")


def destination(args: argparse.Namespace) -> Path:
    """A whole run is what is committed; a part of one must not take its place."""
    if args.output:
        return args.output
    if args.smoke:
        return results.FOLDER / "smoke.csv"
    part = args.axis or args.only or args.methods
    return results.FOLDER / (f"part-{args.device}.csv" if part else f"{args.device}.csv")


def load(path: Path, header: dict[str, str], fresh: bool, chosen: list[Case]) -> list[Row]:
    """The rows to keep of an earlier run: none of another machine, version or commit."""
    if not path.exists():
        return []
    old, rows = results.read(path)
    if fresh:
        rows = [row for row in rows if row.case not in set(chosen)]
    changed = results.differences(old, header)
    if not rows or not changed:
        return rows
    if path.suffixes[-2:] == PARTIAL:
        raise ValueError(
            f"{path} was interrupted, and not measured as this run would be ({'; '.join(changed)}); expected the "
            "same. Delete it or measure everything anew: --fresh, without --axis and --only"
        )
    print(f"starting anew, as {path} was measured otherwise ({'; '.join(changed)})")
    return []


def missing(rows: list[Row], chosen: list[Case], methods: list[str] | None, peers: Peers) -> dict[Case, list[str]]:
    """Cases to measure, with their methods: all again if one is missing, as methods are compared in turns.

    A method that was skipped is missing where that reason is gone.
    """

    def settled(row: Row) -> bool:
        return row.status != "skipped" or METHODS[row.method].why_not(row.case, peers) == row.note

    have = {case: [row.method for row in of_case if settled(row)] for case, of_case in results.by_case(rows).items()}
    todo = {}
    for case in chosen:
        known, wanted = have.get(case, []), methods or compared(case)
        if not set(wanted) <= set(known):
            todo[case] = [name for name in METHODS if name in wanted or name in known]
    return todo


def measure(args: argparse.Namespace, path: Path, chosen: list[Case], methods: list[str] | None) -> list[Row]:
    """Measure what is missing in the file, adding case after case, and give all of its rows."""
    budget = args.budget or (0.2 if args.smoke else 3.0)
    header = results.machine(args.device, args.threads) | {"budget": f"{budget:g} s of steps of a method in a case"}
    if args.insightface:
        header["insightface"] = results.commit_of(Path(args.insightface), ".")
    partial = path.with_suffix("".join(PARTIAL))
    start = partial if partial.exists() else path
    rows = load(start, header, args.fresh, chosen)
    if rows:
        header = results.read(start)[0] | header  # what rows of an earlier run were measured with
    peers = Peers(args.insightface, args.cut_cross_entropy)
    todo = missing(rows, chosen, methods, peers)
    if len(chosen) > len(todo):
        print(f"{len(chosen) - len(todo)} of {len(chosen)} cases are in {start} already; --fresh measures them anew")
    limit = run.default_memory_limit() if args.memory_limit is None else int(args.memory_limit * 2**30)
    if todo:
        results.write(partial, header, rows)  # who may not write there is told before anything is measured
    seen = sys.stderr.isatty()  # in a log, a line in a while is enough
    steps = sum(len(names) + 1 for names in todo.values())
    with tqdm(total=steps, unit="step", disable=not todo, mininterval=0.1 if seen else 20) as bar:
        limits = run.Limits(limit, budget, quick=args.smoke)
        bench = run.Bench(peers, limits, lambda text: bar.set_postfix_str(text, refresh=seen))
        for case, names in todo.items():
            bar.set_description(case.name, refresh=seen)
            measured = bench.measure(case, names, lambda: bar.update() and None)
            rows = [row for row in rows if row.case != case] + measured
            results.write(partial, header, rows)
    if todo:
        partial.replace(path)
    return [row for row in rows if row.case in set(chosen)]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_names(args.methods or [])
        chosen = chosen_cases(args)
        if args.list:
            print("\n".join(case.name for case in chosen))
            return 0
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this torch sees no GPU; expected one")
        if args.smoke and (wrong := wrong_mentions()):
            raise ValueError("named, but not there:\n  " + "\n  ".join(wrong))
        check_paths(args)
        path = destination(args)
        rows = measure(args, path, chosen, args.methods)
    except (ValueError, OSError, run.Died) as error:
        parser.error(str(error))
    print(summary(rows))
    print(f"\n{len(rows)} rows of {len(chosen)} cases in {path}")
    bad = [row for row in rows if row.method == "fused" and row.status != "ok"]
    for row in bad:
        print(f"fused, {row.case.name}: {row.status}: {row.note}", file=sys.stderr)
    if args.smoke:
        bad = [row for row in rows if row.status not in ("ok", "skipped")]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
