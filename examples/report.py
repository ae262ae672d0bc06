"""The results as text and as a picture."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from agreement import LOSS_TOLERANCE, Agreement
from glyph_data import IMAGE, Glyphs, distort
from head_cost import HEADS, HeadCost
from matplotlib.axes import Axes
from torch import Tensor
from training import Recipe
from verification import FARS, Verification

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#9A9A9A", "#222222"  # told apart by the colour-blind too
FLOOR = 1e-8  # where a difference of zero is drawn
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Results:
    """All that was measured."""

    glyphs: Glyphs
    unseen: Tensor  # the classes of verification
    recipe: Recipe
    agreement: Agreement
    plain_verified: Verification
    fused_verified: Verification
    cost: HeadCost


def agreement_text(a: Agreement) -> str:
    """How far the heads are apart, in a few lines."""
    curve, twin = a.curve, a.twin_curve
    last = len(curve)
    first = min(20, last)
    at = ", ".join(f"{curve[s - 1]:.0e} at step {s}" for s in [*(s for s in (1, 10, 100) if s < last), last])
    return "\n".join(
        [
            "How far the fused head is from plain PyTorch, in relative differences:",
            f"  given the same weights and embeddings, at {len(a.point_loss)} of the steps: "
            f"loss {max(a.point_loss):.0e}, gradients {max(a.point_gradient):.0e} at most;",
            f"  losses of the two trainings: {at};",
            f"  at most {curve[:first].max():.0e} in the first {first} steps, {curve.max():.0e} in all.",
            "  Rounding grows in any training: plain PyTorch against itself, with one weight changed in its last bit,",
            f"  differs by {twin[:first].max():.0e} in the first {first} steps, {twin.max():.0e} in {len(twin)}.",
        ]
    )


def megabytes(count: int | None) -> str:
    """Bytes as MB, or that they are unknown."""
    return "not measured" if count is None else f"{count / 1e6:,.0f} MB"


def table(r: Results) -> str:
    """The two heads side by side."""
    cost, size = r.cost, r.cost.size
    runs, verified = (r.agreement.plain, r.agreement.fused), (r.plain_verified, r.fused_verified)
    tail = max(1, len(runs[0].losses) // 20)
    rows = [
        ("", "plain PyTorch", "fused"),
        (f"loss, mean of the last {tail} steps", *(f"{np.mean(x.losses[-tail:]):.3f}" for x in runs)),
        ("training", *(f"{x.seconds:.1f} s" for x in runs)),
        ("  of it in the head", *(f"{x.head_seconds:.1f} s" for x in runs)),
        ("verification accuracy", *(f"{x.accuracy:.2%}" for x in verified)),
        *((f"TAR at FAR {far:g}", *(f"{x.tar_at[far]:.1%}" for x in verified)) for far in FARS),
        (f"one step of a head of {size.classes:,} classes", *(f"{cost.median(n) * 1e3:,.0f} ms" for n in HEADS)),
        ("  memory beyond its inputs", *(megabytes(cost.memory[n]) for n in HEADS)),
    ]
    wide = max(len(row[0]) for row in rows)
    lines = [f"{a:{wide}}  {b:>14}  {c:>12}" for a, b, c in rows]
    lines.insert(1, "-" * len(lines[0]))
    v = r.plain_verified
    notes = [
        f"Verification: all {v.same_pairs:,} same and {v.different_pairs:,} different pairs of unseen classes.",
        f"Head: ArcFace, batch {size.batch}, dimension {size.embedding_size}, float32, forward and backward; median of",
        f"{size.repeats} in turns, in which the fused one is {cost.speedup:.1f} times as fast. The memory includes the",
        f"gradient of the weights, {megabytes(size.weight_bytes)}, which either head has to return.",
    ]
    return "\n".join([*lines, "", *notes])


def draw(r: Results, path: Path) -> None:
    """The picture, as a PNG."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 8.4), dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        figure.suptitle("One training, two heads: plain PyTorch and fused_margin", size=15, weight="bold")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 3.2])
        left, middle, right = bottom.subfigures(1, 3, width_ratios=[1.45, 1.15, 0.8])
        draw_glyphs(top.subplots(), r)
        draw_curves(*left.subplots(2, 1, height_ratios=[1.1, 1]), r)
        draw_roc(middle.subplots(), r)
        draw_bars(*right.subplots(2, 1), r.cost)
        figure.savefig(path, format="png")
        plt.close(figure)


def draw_glyphs(axes: Axes, r: Results, rows: int = 3, columns: int = 2) -> None:
    """Some of the unseen classes, letters if there are enough: one image of every face."""
    chosen = sorted(r.unseen.tolist(), key=lambda c: not r.glyphs.characters[c].isalpha())[: rows * columns]
    faces = len(r.glyphs.faces)
    generator = torch.Generator().manual_seed(r.recipe.seed)
    images = 1 - distort(r.glyphs.drawings[chosen].flatten(0, 1), generator)
    gap = IMAGE // 2
    width = faces * IMAGE + gap
    sheet = np.ones((rows * IMAGE, columns * width - gap))
    for place, image in enumerate(images.clamp(0, 1).numpy()[:, 0]):
        block, face = divmod(place, faces)
        row, column = divmod(block, columns)
        x, y = column * width + face * IMAGE, row * IMAGE
        sheet[y : y + IMAGE, x : x + IMAGE] = image
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    axes.set_axis_off()
    axes.set_title(
        f"A class is a character; its samples are {faces} faces, randomly distorted. "
        f"Here {len(chosen)} of the {len(r.unseen)} classes that training never saw"
    )


def draw_curves(upper: Axes, lower: Axes, r: Results) -> None:
    """The losses, and below them their differences, where the first steps have more room."""
    a = r.agreement
    steps = np.arange(1, len(a.plain.losses) + 1)
    upper.plot(steps, a.plain.losses, color=BLUE, linewidth=3, alpha=0.45, label="plain PyTorch")
    upper.plot(steps, a.fused.losses, color=ORANGE, linewidth=0.9, label="fused")
    title = f"Training loss: {r.recipe.loss}, {len(a.plain.head.weight):,} classes"
    upper.set(title=title, ylim=(0, None), xlim=(0, len(steps) + 1))
    upper.legend(loc="upper right")

    twin = np.maximum(a.twin_curve, FLOOR)
    lower.plot(steps[: len(twin)], twin, color=GREY, linewidth=2, label="plain, one weight changed by 1 ulp")
    lower.plot(steps, np.maximum(a.curve, FLOOR), color=ORANGE, linewidth=0.8, label="fused")
    lower.plot([1, a.early + 1], [LOSS_TOLERANCE] * 2, color=INK, linewidth=3, label="allowed early on")
    lower.set(title="Relative difference from plain PyTorch", xscale="log", yscale="log", xlabel="step")
    lower.set(xlim=(0.95, len(steps) * 1.05), ylim=(FLOOR / 2, 2))
    lower.xaxis.set_major_formatter("{x:g}")
    lower.figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def draw_roc(axes: Axes, r: Results) -> None:
    """TAR over FAR of both."""
    looks = (("plain PyTorch", r.plain_verified, BLUE, 4, 0.45), ("fused", r.fused_verified, ORANGE, 1.3, 1))
    for name, v, colour, width, alpha in looks:
        at = ", ".join(f"{v.tar_at[far]:.1%} at FAR {far:g}" for far in FARS)
        axes.plot(v.far, v.tar, color=colour, linewidth=width, alpha=alpha, label=f"{name}: TAR {at}")
        axes.plot(FARS, [v.tar_at[far] for far in FARS], "o", color=colour, markersize=2 * width + 2, alpha=alpha)
    axes.set(
        title="Verification of unseen characters", xscale="log", xlabel="false accept rate", ylabel="true accept rate"
    )
    axes.set(xlim=(1e-5, 1), ylim=(0, 1.02))
    axes.figure.legend(loc="outside lower center")


def draw_bars(upper: Axes, lower: Axes, cost: HeadCost) -> None:
    """Time and memory of the heads alone."""
    size = cost.size
    times = [cost.median(name) * 1e3 for name in HEADS]
    draw_bar_pair(upper, times, [f"{t:,.0f} ms" for t in times])
    upper.set_title(f"A head of {size.classes:,} classes\nTime of a step: {cost.speedup:.1f} times as fast")
    memory = [cost.memory[name] for name in HEADS]
    if None in memory:
        lower.set_axis_off()
        lower.set_title("Memory: not measured on this system")
        return
    draw_bar_pair(lower, [m / 1e6 for m in memory], [megabytes(m) for m in memory])
    lower.axhline(size.weight_bytes / 1e6, color=INK, linewidth=1, linestyle="--")
    lower.set_title("Memory beyond its inputs\n(dashed: the weights' gradient)")


def draw_bar_pair(axes: Axes, values: list[float], labels: list[str]) -> None:
    """Two bars with their values on top."""
    bars = axes.bar(list(HEADS), values, color=[BLUE, ORANGE], width=0.6)
    axes.bar_label(bars, labels, padding=3, weight="bold")
    axes.set(ylim=(0, max(values) * 1.18), yticks=[])
    axes.grid(visible=False)
    axes.spines.left.set_visible(False)
