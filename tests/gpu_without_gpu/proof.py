"""The proof tables of docs/gpu.md, made anew: `python -m tests.gpu_without_gpu.proof [--write FILE...]`."""

import argparse
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

from bench.table import write_sections

from .compiled.test_sweep_ptx import MUTATED, mutate
from .resources import ARCHES, STEPS, rows_of, table


def mutants() -> str:
    """A row for each kernel and architecture."""
    lines = ["| kernel | device | mutants | reported | not needed: no bit changes |", "|---|---|---|---|---|"]
    for arch, device, kernel in MUTATED:
        found = mutate(arch, device, kernel)
        silent = [name for name, complaint in found.items() if not complaint]
        reported = len(found) - len(silent)
        lines.append(f"| `{kernel}` | sm_{arch} | {len(found)} | {reported} | {', '.join(silent) or '-'} |")
    return "\n".join(lines)


def resources() -> str:
    return table(row for step in STEPS for arch in ARCHES for row in rows_of(step, arch))


SECTIONS = {"mutants": mutants, "resources": resources}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_without_gpu.proof", description=__doc__)
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", default=[], help="replace the sections there")
    args = parser.parse_args()
    for path in args.write:
        write_sections(path, "proof", SECTIONS)
    if not args.write:
        print("\n\n".join(make() for make in SECTIONS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
