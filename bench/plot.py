"""The picture from the CSV of results: time, memory and cost per logit against the number of classes.

python -m bench.plot [CSV] [--output PNG]         also prints the exponents of growth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import results
from .cases import Case
from .results import Row, by_case
from .stats import growth

COLOURS = {
    "fused": "#d1495b",
    "eager": "#30638e",
    "torch-compile": "#3d9ba8",
    "pytorch-metric-learning": "#8d6a9f",
    "insightface": "#c98b2b",
}
FLOOR, INK, GRID = "#777777", "#333333", "#e4e4e4"
FIT_FROM = 10_000  # classes: below, overhead is part of the time, and no exponent means anything
GB = 2**30


def along_classes(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of the axis of classes, by method, in rising order; in float32, ArcFace, forward and backward."""
    threads = max(row.case.threads for row in rows)
    centre = Case(threads=threads, device=rows[0].case.device)
    found: dict[str, list[Row]] = {name: [] for name in COLOURS}
    for case, of_case in sorted(by_case(rows).items(), key=lambda item: item[0].classes):
        if case == Case(**(centre.as_dict() | {"classes": case.classes})):
            for row in of_case:
                if row.method in found:
                    found[row.method].append(row)
    return {name: line for name, line in found.items() if any(row.seconds for row in line)}


def exponents(lines: dict[str, list[Row]]) -> dict[str, float]:
    """k of time ~ C^k, from FIT_FROM classes on."""
    fits = {}
    for name, line in lines.items():
        far = [row for row in line if row.seconds and row.case.classes >= FIT_FROM]
        fits[name] = growth([row.case.classes for row in far], [row.time.median for row in far])
    return fits


def _classes(value: float, _: object = None) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _style(axes: Axes, title: str, unit: str) -> None:
    axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=22)
    axes.text(0, 1.025, unit, transform=axes.transAxes, fontsize=9, color="#666666")
    axes.set_xlabel("classes", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(_classes))
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aaaaaa")


def _line(axes: Axes, name: str, line: list[Row], value: str) -> None:
    """A method's line; `value` says which of its figures."""
    get = {
        "time": lambda row: row.time if row.seconds else None,
        "memory": lambda row: (row.peak / GB,) * 3 if row.peak else None,
        "logit": lambda row: (
            tuple(t / row.case.batch / row.case.classes * 1e9 for t in row.time) if row.seconds else None
        ),
    }[value]
    points = [(row.case.classes, get(row)) for row in line if get(row)]
    if not points:
        return
    x, spreads = [p[0] for p in points], [p[1] for p in points]
    front = name == "fused"
    style = {"color": COLOURS[name], "linewidth": 2.6 if front else 1.7, "zorder": 4 if front else 3}
    axes.plot(x, [s[0] for s in spreads], marker="o", markersize=5 if front else 4, label=name, **style)
    axes.fill_between(x, [s[1] for s in spreads], [s[2] for s in spreads], color=COLOURS[name], alpha=0.18, linewidth=0)


def _mark_limits(axes: Axes, lines: dict[str, list[Row]]) -> None:
    """Crosses above the first size at which a method runs out of memory; a text beside them says at how much."""
    firsts = {name: next((row for row in line if row.status == "out of memory"), None) for name, line in lines.items()}
    crosses: dict[int, list[str]] = {}
    for name, row in firsts.items():
        if row is not None:
            crosses.setdefault(row.case.classes, []).append(name)
    if not crosses:
        return
    low, high = axes.get_ylim()
    apart = (high / low) ** 0.045
    most = max(len(names) for names in crosses.values())
    axes.set_ylim(low, high * apart ** (most + 1.5))
    for x, names in crosses.items():
        for place, name in enumerate(reversed(names), 1):
            axes.plot(x, high * apart**place, "x", markersize=6, markeredgewidth=2, color=COLOURS[name])
        axes.annotate(
            firsts[names[0]].note, (x, high * apart ** ((len(names) + 1) / 2)), (-9, 0),
            textcoords="offset points", ha="right", va="center", fontsize=8.5, color="#666666",
        )  # fmt: skip


def _floor(axes: Axes, lines: dict[str, list[Row]], per_logit: bool) -> None:
    rows = [row for row in lines["fused"] if row.floor_seconds]
    values = [row.floor_seconds * (1e9 / row.case.batch / row.case.classes if per_logit else 1) for row in rows]
    axes.plot([row.case.classes for row in rows], values, "--", color=FLOOR, linewidth=1.4, zorder=2, label="floor")


def _number(value: float, _: object = None) -> str:
    return f"{value:g}" if value >= 1e-4 else f"{value:.0e}"


def draw(header: dict[str, str], rows: list[Row], path: Path) -> dict[str, float]:
    """Write the picture; the exponents of growth."""
    lines = along_classes(rows)
    if "fused" not in lines:
        raise ValueError("no fused row on the axis of classes; expected results of `python -m bench --axis classes`")
    fits = exponents(lines)
    figure, (time, memory, logit) = plt.subplots(1, 3, figsize=(14, 5.0), facecolor="white")
    _style(time, "Time of a step", "seconds, forward + backward")
    _style(memory, "Memory of a step", "GB, the peak beyond embeddings and weights")
    _style(logit, "Time per logit", "nanoseconds per sample and class: flat is linear")
    for name, line in lines.items():
        for axes, value in ((time, "time"), (memory, "memory"), (logit, "logit")):
            _line(axes, name, line, value)
    for axes in (time, memory, logit):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _floor(time, lines, per_logit=False)
    _floor(logit, lines, per_logit=True)
    sizes = [row.case.classes for row in lines["fused"]]
    kept = [row.case.kept_bytes / GB for row in lines["fused"]]
    memory.plot(sizes, kept, "--", color=FLOOR, linewidth=1.4, zorder=2)
    memory.annotate(
        "the weights' gradient alone", (sizes[len(sizes) // 2], kept[len(sizes) // 2]), (10, -14),
        textcoords="offset points", fontsize=8.5, color="#666666",
    )  # fmt: skip
    for axes in (time, memory):
        _mark_limits(axes, lines)
    logit.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _legend(figure, time, fits)
    case = lines["fused"][-1].case
    where = header["device"] if case.device == "cuda" else f"{case.threads} threads of {header['cpu']}"
    figure.text(
        0.012, 0.012,
        f"ArcFace, batch {case.batch}, dimension {case.dim}, float32, {where}; "
        f"torch {header['torch']}; commit {header['commit'][:7]}. Bands: p20 to p80. Floor: 8 x batch x dimension "
        "x classes operations at the best rate of a matrix product, in the same run.",
        fontsize=8, color="#666666",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.035, 1, 0.93), w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return fits


def _legend(figure: plt.Figure, axes: Axes, fits: dict[str, float]) -> None:
    handles, names = axes.get_legend_handles_labels()
    texts = [f"{n}  ~ C^{fits[n]:.2f}" if fits.get(n, float("nan")) == fits.get(n) else n for n in names]
    figure.legend(
        handles, texts, loc="upper left", bbox_to_anchor=(0.008, 0.995), ncols=len(names), frameon=False,
        fontsize=9.5, labelcolor=INK, handlelength=1.8, columnspacing=1.8,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.split("\n")[0])
    parser.add_argument("csv", nargs="?", type=Path, default=results.FOLDER / "cpu.csv")
    parser.add_argument("--output", type=Path, help="the picture (default: beside the CSV)")
    args = parser.parse_args(argv)
    if not args.csv.exists():
        parser.error(f"{args.csv} is not there; expected the results of `python -m bench`")
    try:
        fits = draw(*results.read(args.csv), args.output or args.csv.with_suffix(".png"))
    except ValueError as error:
        parser.error(str(error))
    for name, exponent in fits.items():
        if exponent == exponent:  # nan: measured at one size only
            print(f"time of {name} ~ classes^{exponent:.3f}, from {FIT_FROM:,} classes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
