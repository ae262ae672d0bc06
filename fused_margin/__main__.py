"""`python -m fused_margin`: what is installed and which backends run. `... check`: are their numbers right?"""

from __future__ import annotations

import argparse
import sys

import torch

from . import __version__
from .backends import BACKENDS, cpu, triton, why_not
from .check import all_margins, check_margin, table


def _info() -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"fused_margin {__version__}, torch {torch.__version__}, Python {python}, {torch.get_num_threads()} threads")
    what = {"cpu": cpu.path, "triton": triton.path, "reference": lambda: "plain PyTorch, holds [B, C] tensors"}
    for name in BACKENDS:
        reasons = why_not(name)
        print(f"  {name:10} " + (f"not here: {', '.join(reasons)}" if reasons else f"runs: {what[name]()}"))


def _check(quick: bool) -> int:
    margins, results = all_margins(), []
    for number, margin in enumerate(margins, 1):
        if sys.stderr.isatty():
            print(f"\r{number}/{len(margins)} ", end="", file=sys.stderr, flush=True)
        results += check_margin(margin, quick=quick)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    print(table(results))
    failed = sum(not r.ok for r in results)
    print(
        f"\n{len(results)} checks, {failed} failed. Error: the largest, relative to the largest entry, of losses and "
        "gradients against float64; gradient: against finite differences."
    )
    return int(failed > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-margin", description=__doc__)
    parser.add_argument("--require", nargs="+", metavar="BACKEND", default=[], help="fail if one of these cannot run")
    commands = parser.add_subparsers(dest="command", metavar="check")
    check = commands.add_parser("check", help="gradients and parity of every margin on every backend present")
    check.add_argument("--quick", action="store_true", help="fewer seeds, no 16-bit operands")
    args = parser.parse_args(argv)
    if args.command == "check":
        return _check(args.quick)
    _info()
    missing = {name: why_not(name) for name in args.require if why_not(name)}
    for name, reasons in missing.items():
        print(f"required backend {name} cannot run: {', '.join(reasons)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
