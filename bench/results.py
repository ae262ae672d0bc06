"""The results: a CSV of one row per case and method, under comments that say on what it was measured."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import fused_margin as fm

from . import ROOT
from .cases import Case
from .stats import Spread, paired, spread

FOLDER = ROOT / "bench/results"
MEASURED = ("fused_margin", "csrc", "bench/*.py", "examples/head_cost.py")  # what decides the numbers
# What must agree to go on with a file, if both say it.
SAME = ("machine", "cpu", "device", "cpu path", "torch", "fused_margin", "commit", "budget", "insightface")


@dataclass
class Row:
    """What is known of one method on one case."""

    case: Case
    method: str
    status: str  # ok | skipped | red gate | out of memory | too slow | failed
    note: str = ""
    error: float | None = None  # the largest of the gate's, relative
    peak: int | None = None  # bytes beyond inputs and weights
    floor_rate: float | None = None  # operations per second
    seconds: list[float] = field(default_factory=list)  # of each round

    @property
    def time(self) -> Spread:
        return spread(self.seconds)

    @property
    def beyond(self) -> int | None:
        """Peak bytes beyond inputs, weights, and what must be left behind: the weights' gradient and momentum."""
        return None if self.peak is None else max(self.peak - self.case.kept_bytes, 0)

    @property
    def floor_seconds(self) -> float | None:
        return self.case.flops / self.floor_rate if self.floor_rate else None

    @property
    def over_floor(self) -> float | None:
        return self.time.median / self.floor_seconds if self.seconds and self.floor_rate else None


def times_as_fast(rows: list[Row], method: str, than: str) -> Spread | None:
    """Paired ratio of the time of `than` to that of `method`, among the rows of one case; None without both."""
    seconds = {row.method: row.seconds for row in rows}
    if not seconds.get(method) or not seconds.get(than):
        return None
    return paired(seconds[than], seconds[method])


def by_case(rows: list[Row]) -> dict[Case, list[Row]]:
    found: dict[Case, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


# The file

CASE_COLUMNS = [f.name for f in fields(Case)]
COLUMNS = [
    *CASE_COLUMNS, "method", "status", "repeats", "median_s", "p20_s", "p80_s",
    "vs_eager", "vs_eager_p20", "vs_eager_p80", "fused_is", "fused_is_p20", "fused_is_p80",
    "over_floor", "floor_flops_per_s", "peak_bytes", "beyond_bytes", "gate_error", "note", "seconds",
]  # fmt: skip


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _cells(row: Row, rows: list[Row]) -> dict[str, object]:
    """Columns of a row. All figures follow from `seconds`, `peak_bytes` and `floor_flops_per_s`."""
    cells: dict[str, object] = row.case.as_dict() | {"method": row.method, "status": row.status, "note": row.note}
    time = row.time if row.seconds else (None, None, None)
    vs_eager = times_as_fast(rows, row.method, "eager") or (None, None, None)
    fused_is = times_as_fast(rows, "fused", row.method) or (None, None, None)
    for name, values in (("{}_s", time), ("vs_eager{}", vs_eager), ("fused_is{}", fused_is)):
        for part, value in zip(("median", "p20", "p80"), values, strict=True):
            part = part if name == "{}_s" else "" if part == "median" else f"_{part}"
            cells[name.format(part)] = _figure(value)
    return cells | {
        "repeats": len(row.seconds),
        "over_floor": _figure(row.over_floor),
        "floor_flops_per_s": _figure(row.floor_rate),
        "peak_bytes": "" if row.peak is None else row.peak,
        "beyond_bytes": "" if row.beyond is None else row.beyond,
        "gate_error": _figure(row.error),
        "seconds": " ".join(f"{s:.6g}" for s in row.seconds),
    }


def write(path: Path, header: dict[str, str], rows: list[Row]) -> None:
    """All of it, at once: an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in header.items())
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for of_case in by_case(rows).values():
            writer.writerows(_cells(row, of_case) for row in of_case)
    new.replace(path)


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    header, lines = {}, []
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            name, _, value = line[2:].partition(": ")
            header[name] = value
        else:
            lines.append(line)
    table = csv.DictReader(lines)
    if lacking := [name for name in COLUMNS if name not in (table.fieldnames or [])]:
        raise ValueError(f"{path} is no table of this bench: it has no column {', '.join(lacking)}")
    return header, [_row(cells) for cells in table]


def _row(cells: dict[str, str]) -> Row:
    kinds = {name: type(value) for name, value in asdict(Case()).items()}
    case = Case(**{name: kinds[name](cells[name]) for name in CASE_COLUMNS})
    return Row(
        case,
        cells["method"],
        cells["status"],
        cells["note"],
        error=float(cells["gate_error"]) if cells["gate_error"] else None,
        peak=int(cells["peak_bytes"]) if cells["peak_bytes"] else None,
        floor_rate=float(cells["floor_flops_per_s"]) if cells["floor_flops_per_s"] else None,
        seconds=[float(s) for s in cells["seconds"].split()],
    )


# The machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"


def commit_of(folder: Path, *paths: str) -> str:
    """The last commit that changed one of these paths of the folder, and whether they were changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words, "--", *paths], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=12")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    return f"{commit}{' with changes' if changed else ''}" if commit else "unknown"


def _versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {}
    for name in ("pytorch-metric-learning", "cut-cross-entropy", "liger-kernel", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str, threads: int) -> dict[str, str]:
    """The header of a file of results."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {total / 2**30:.0f} GB",
        "cpu": _cpu_model(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu path": fm.backends.cpu.path(),
        "threads": f"{threads} unless a row says otherwise",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_margin": fm.__version__,
        **_versions(),
        "commit": commit_of(ROOT, *MEASURED),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What of the machine differs, in words."""
    both = [name for name in SAME if name in old and name in new]
    return [f"{name}: {old[name]!r} there, {new[name]!r} now" for name in both if old[name] != new[name]]
