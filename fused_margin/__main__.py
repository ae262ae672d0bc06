"""`python -m fused_margin`: what is installed and which backends run. `... check`: are their numbers right?
`... plan`: what a training will take."""

from __future__ import annotations

import argparse
import math
import sys

import torch

from . import __version__, plan
from .backends import BACKENDS, why_not
from .check import all_margins, check_margin, table


def _info() -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"fused_margin {__version__}, torch {torch.__version__}, Python {python}, {torch.get_num_threads()} threads")
    for name, backend in BACKENDS.items():
        reasons = why_not(name)
        print(f"  {name:10} " + (f"not here: {', '.join(reasons)}" if reasons else f"runs: {backend.path()}"))


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


def _whole(text: str) -> int:
    """30000000, 30e6 or 30_000_000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1, as 30000000 or 30e6")
    return int(value)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    setup = plan.Setup(1)
    parser = commands.add_parser("plan", help="memory, communication and modelled time of a training")
    parser.add_argument("--classes", type=_whole, required=True, help="as 30e6")
    parser.add_argument("--dim", type=_whole, default=setup.dim, help="of the embeddings (%(default)s)")
    parser.add_argument("--world", type=_whole, default=setup.world, help="ranks (%(default)s)")
    parser.add_argument("--batch", type=_whole, default=setup.batch, help="rows of all ranks together (%(default)s)")
    parser.add_argument("--sample-rate", type=float, default=setup.sample_rate, help="of the classes (%(default)s)")
    parser.add_argument("--optimizer", choices=plan.OPTIMIZERS, default=setup.optimizer, help="default %(default)s")
    for name in ("weight", "embedding"):
        parser.add_argument(f"--{name}-dtype", choices=plan.BYTES, default="fp32", help="default %(default)s")
    parser.add_argument("--sub-centers", type=_whole, default=1, help="rows of a class (%(default)s)")
    parser.add_argument(
        "--mask", action="store_true", help="a margin that compares rivals with the target (SV, Curricular)"
    )
    parser.add_argument("--device", choices=plan.DEVICES, default=setup.device, help="for the model (%(default)s)")
    parser.add_argument("--memory", type=float, metavar="GB", help="of a rank (default: the device's)")
    parser.add_argument("--reserve", type=float, metavar="GB", default=0.0, help="for the backbone and the rest")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-margin", description=__doc__)
    parser.add_argument("--require", nargs="+", metavar="BACKEND", default=[], help="fail if one of these cannot run")
    commands = parser.add_subparsers(dest="command", metavar="check | plan")
    check = commands.add_parser("check", help="gradients and parity of every margin on every backend present")
    check.add_argument("--quick", action="store_true", help="fewer seeds, no 16-bit operands")
    _add_plan(commands)
    args = parser.parse_args(argv)
    if args.command == "plan":
        options = {name: value for name, value in vars(args).items() if name not in ("command", "require")}
        try:
            print(plan.report(plan.Setup(**options)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if args.command == "check":
        return _check(args.quick)
    _info()
    missing = {name: why_not(name) for name in args.require if why_not(name)}
    for name, reasons in missing.items():
        print(f"required backend {name} cannot run: {', '.join(reasons)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
