"""The picture of docs/losses.md: target and rival logit against the angle, a plot a family.

    python examples/loss_gallery.py --out docs/losses.png

All curves come from the library: T from the margins, N from the rules. A rival is drawn for a target at 60 degrees.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from report import STYLE
from torch import Tensor

import fused_margin as fm
from fused_margin.rules import RULES

ANGLES = torch.linspace(0.25, 179.75, 719, dtype=torch.float64)
COSINES = torch.cos(torch.deg2rad(ANGLES))
TARGET = 60.0  # degrees, where a rival's rule depends on it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5195")
DASHED = (0, (2.2, 1.3))


class Curve(NamedTuple):
    """A loss as it is drawn."""

    margin: fm.Margin
    norm: float = 0.0  # of the embedding, where the margin asks for it
    unit: float = 1.0  # T and N are drawn in this unit
    band: tuple[fm.Margin, fm.Margin] | None = None  # between which T is drawn at random


class Panel(NamedTuple):
    """A family: what its curves are, in a formula, and where the legend is out of their way."""

    title: str
    formula: str
    curves: dict[str, Curve | fm.Margin]
    legend: str = "lower left"


def _curricular(t: float) -> fm.Margin:
    margin = fm.CurricularFace().eval()
    margin.t.fill_(t)
    return margin


def _adaface() -> fm.Margin:
    margin = fm.AdaFace().eval()
    margin.std.fill_(6.0)
    return margin


PANELS = (
    Panel(
        "Cosine and angular margins",
        r"$\cos(m_1\theta + m_2) - m_3$",
        {
            "CosFace, AM 0.35": fm.CosFace(0.35),
            "ArcFace 0.5": fm.ArcFace(0.5, "continuous"),
            "combined 1.1, 0.3, 0.2": fm.CombinedMargin(1.1, 0.3, 0.2),
        },
    ),
    Panel(
        "ArcFace's tails",
        r"beyond $\theta + m = \pi$",
        {tail: fm.ArcFace(0.5, tail) for tail in ("raw", "linear", "continuous", "clamp", "easy")},
    ),
    Panel(
        "A-Softmax, L-Softmax, SphereFace",
        r"$\psi = (-1)^k \cos m\theta - 2k$",
        {
            "m = 1.7": fm.SphereFace(1.7),
            "m = 4": fm.SphereFace(4),
            r"m = 4, annealed, $\lambda$ = 5": fm.Annealed(fm.SphereFace(4), 5.0),
        },
        "upper right",
    ),
    Panel(
        "SphereFace-R",
        r"$\psi$,  $\cos \min(m\theta, \pi)$,  rivals $\cos(\theta / m)$",
        {f"v{version}, m = 1.4": fm.SphereFaceR(1.4, version) for version in (0, 1, 2)},
    ),
    Panel(
        "Lines and parabolas of the angle",
        r"$b_0 + b_1\theta + b_2\theta^2$",
        {
            "X2": fm.X2Softmax(),
            "AirFace": fm.LiArcFace(rivals="cosine"),
            "Li-ArcFace": fm.LiArcFace(0.3),
            "QAMFace, / 39.5": Curve(fm.QAMFace(), unit=4 * math.pi**2),
        },
    ),
    Panel(
        "Generalized angular softmax",
        r"$g(m\theta)$, rivals $g(\theta)$",
        {kind: fm.GASoftmax(kind) for kind in ("linear", "cosine", "sigmoid")},
    ),
    Panel(
        "Support vectors",
        r"rivals beyond $T$:  $t c + t - 1$",
        {
            "SV 1.2": fm.SVSoftmax(1.2),
            "SV-X, AM 0.35": fm.SVSoftmax(1.2, fm.CosFace(0.35)),
            "SV-X, ArcFace 0.5": fm.SVSoftmax(1.2, fm.ArcFace(0.5, "continuous")),
        },
    ),
    Panel(
        "Mis-classified vectors",
        r"$(t + 1) c + t$  or  $c + t$",
        {
            "MV-AM": fm.MVSoftmax(),
            "MV-AM, fixed": fm.MVSoftmax(mode="fixed"),
            "MV-Arc": fm.MVSoftmax(m=0.5, kind="arc"),
        },
    ),
    Panel(
        "CurricularFace",
        r"rivals beyond $\cos(\theta_y + m)$:  $c\,(t + c)$",
        {f"t = {t:g}": _curricular(t) for t in (0.0, 0.4, 0.8)},
    ),
    Panel(
        "Hard negatives",
        r"$t c + a$;   $q c + q - 1$",
        {"NPCFace": fm.NPCFace(), "ArcNegFace": fm.ArcNegFace()},
    ),
    Panel(
        "Bounds",
        r"$\min(c, t_1) - o$,  rivals $\max(c, t_2)$",
        {
            "EqM 0.75, 0.25": fm.EqM(),
            "EqM, offset 0": fm.EqM(offset=0.0),
            "inter-class filter 0.4": fm.InterclassFilter(0.4, fm.ArcFace(0.5, "continuous")),
        },
    ),
    Panel(
        "Circle loss",
        r"$[1 + m - c]_+ (c - 1 + m)$,  $[c + m]_+ (c - m)$",
        {"m = 0.25": fm.CircleLoss(0.25), "m = 0.4": fm.CircleLoss(0.4)},
    ),
    Panel(
        "By the norm of the embedding",
        r"$m(\|x\|)$",
        {
            "AdaFace, poor image": Curve(_adaface(), norm=1.0),
            "AdaFace, good image": Curve(_adaface(), norm=60.0),
            "MagFace, norm 10": Curve(fm.MagFace(), norm=10.0),
            "MagFace, norm 110": Curve(fm.MagFace(), norm=110.0),
        },
    ),
    Panel(
        "By chance, by class, learned",
        r"$m_i \sim N(m, \sigma^2)$,  $m_y$",
        {
            r"ElasticFace 0.5 $\pm$ 2 $\times$ 0.05": Curve(
                fm.ArcFace(0.5, "raw"), band=(fm.ArcFace(0.4, "raw"), fm.ArcFace(0.6, "raw"))
            ),
            "dynamic, Kappa: a common class": fm.ArcFace(0.05, "continuous"),
            "dynamic, Kappa: a rare class": fm.ArcFace(0.7, "continuous"),
            "AdaM, learned 0.3": fm.CosFace(0.3),
        },
    ),
    Panel(
        "Without softmax",
        r"each through a softplus;  $g = 2 ((c + 1) / 2)^t - 1$",
        {
            **{f"SphereFace2 {kind}": fm.SphereFace2(100, kind) for kind in "CAM"},
            "UniFace": fm.UniFace(100),
        },
    ),
    Panel("Direct", r"$\Sigma_j\, u_j - z_y$", {"SFace": fm.SFace(), "P2SGrad": fm.P2SGrad()}),
)


def curves(margin: fm.Margin, norm: float) -> tuple[Tensor, Tensor]:
    """T and N over ANGLES."""
    count = len(ANGLES)
    labels, valid = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)
    classes = getattr(margin, "num_classes", count + 1)
    found = fm.RowStats(valid, classes, COSINES.dtype, COSINES, torch.full_like(COSINES, norm))
    with torch.no_grad():
        record = margin.prepare(found, labels)
        rule, record = record.rule(), record.at(labels, classes, COSINES.dtype)
        tau = record.threshold(torch.full_like(COSINES, math.cos(math.radians(TARGET))))
        return record.target(COSINES), RULES[rule.name].value(COSINES, tau, rule.tensor(COSINES))


def with_gaps(y: Tensor) -> Tensor:
    """Without the lines that would join a jump's two ends."""
    y = y.clone()
    y[1:][y.diff().abs() > 0.08] = torch.nan
    return y


def draw(axes: Axes, panel: Panel) -> None:
    axes.plot(ANGLES, COSINES, color="#C4C4C4", linewidth=4.5, zorder=1, solid_capstyle="round")
    axes.axvline(TARGET, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
    for number, (name, entry) in enumerate(panel.curves.items()):
        curve = entry if isinstance(entry, Curve) else Curve(entry)
        target, rival = (t / curve.unit for t in curves(curve.margin, curve.norm))
        colour, front = COLOURS[number], 3 + 0.1 * number
        width = 3.4 - 2.2 * number / max(1, len(panel.curves) - 1)  # those in front are thinner, so that all show
        axes.plot(ANGLES, with_gaps(target), color=colour, linewidth=width, label=name, zorder=front)
        if curve.band is not None:
            low, high = (curves(margin, curve.norm)[0] for margin in curve.band)
            axes.fill_between(ANGLES, low, high, color=colour, alpha=0.25, linewidth=0)
        if not torch.allclose(rival, COSINES, atol=2e-3):
            axes.plot(
                ANGLES, with_gaps(rival), color=colour, linewidth=0.4 + 0.7 * width, linestyle=DASHED, zorder=front
            )
    axes.set_title(panel.title, pad=17)
    axes.text(0, 1.02, panel.formula, transform=axes.transAxes, size=9, color="#555555", va="bottom")
    axes.set(xlim=(0, 180), ylim=(-2.2, 1.5), xticks=range(0, 181, 30), yticks=(-2, -1, 0, 1))
    axes.xaxis.set_major_formatter("{x:g}°")
    axes.legend(
        loc=panel.legend, fontsize=8, handlelength=1.5, borderpad=0.25, labelspacing=0.25, borderaxespad=0.3,
        frameon=True, framealpha=0.85, edgecolor="none",
    )  # fmt: skip


def key() -> list[Line2D]:
    """What the kinds of lines are."""
    ink = "#333333"
    return [
        Line2D([], [], color=ink, linewidth=2.2, label="target logit T (over s)"),
        Line2D([], [], color=ink, linewidth=1.9, linestyle=DASHED, label="rival logit N, where it is not the cosine"),
        Line2D([], [], color="#C4C4C4", linewidth=4.5, label="the cosine: NormFace, and all other rivals"),
        Line2D([], [], color="#999999", linewidth=0.9, linestyle=":", label="where the target is, for rules that ask"),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("losses.png"), metavar="FILE", help="a PNG (default: losses.png)")
    out = p.parse_args().out
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(4, 4, figsize=(14.5, 13.2), dpi=110, layout="constrained", sharex=True, sharey=True)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.07)
        figure.suptitle(
            "The losses: what each makes of the angle between embedding and class centre", size=16, weight="bold"
        )
        for place, panel in zip(axes.flat, PANELS, strict=True):
            draw(place, panel)
        figure.legend(handles=key(), loc="outside lower center", ncols=4, fontsize=10)
        figure.savefig(out, format="png")
    print(out)


if __name__ == "__main__":
    main()
