"""The proof tables of docs/gpu.md from what the tests found.

FUSED_MARGIN_PROOF=FOLDER python -m pytest -m "not gpu" tests/gpu_without_gpu     # tests `record` their rows there
python -m tests.gpu_without_gpu.proof FOLDER [--write FILE...]
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench.table import write_sections


def record(table: str, row: dict) -> None:
    """Add a row to a table, if the tests are run to make the tables."""
    if folder := os.environ.get("FUSED_MARGIN_PROOF"):
        path = Path(folder) / f"{table}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            print(json.dumps(row), file=file)


def markdown(rows: list[dict]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in rows)])


def table(folder: Path, name: str) -> str:
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; expected what the tests record, see `make test-gpu-without-gpu`")
    return markdown([json.loads(line) for line in path.read_text().splitlines()])


def sections(folder: Path) -> dict[str, Callable[[], str]]:
    """Those of CUDA C++ only where nvcc was there to make them."""
    of_cuda = (
        name for name in ("cuda_numbers", "cuda_mutants", "cuda_resources") if (folder / f"{name}.jsonl").exists()
    )
    return {name: functools.partial(table, folder, name) for name in ("numbers", "mutants", "resources", *of_cuda)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_without_gpu.proof", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what FUSED_MARGIN_PROOF was")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", default=[], help="replace the sections there")
    args = parser.parse_args()
    found = sections(args.folder)
    for path in args.write:
        write_sections(path, "proof", found)
    if not args.write:
        print("\n\n".join(make() for make in found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
