"""The picture of docs/losses.md: target and rival logit against the angle, a plot a family.

    python examples/loss_gallery.py --out docs/losses.png

All curves come from the library: T from the margins, N from the rules. A rival is drawn for a target at 60 degrees.
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from report import STYLE
from torch import Tensor

import fused_margin as fm
from fused_margin.rules import RULES

ANGLES = torch.linspace(0.5, 179.5, 360, dtype=torch.float64)
TARGET = 60.0  # degrees, where a rival's rule depends on it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
PANELS: dict[str, dict[str, fm.Margin]] = {
    "Additive and angular": {
        "CosFace 0.35": fm.CosFace(0.35),
        "ArcFace 0.5": fm.ArcFace(0.5, "continuous"),
        "combined 1.1, 0.3, 0.2": fm.CombinedMargin(1.1, 0.3, 0.2),
    },
    "ArcFace's tails": {
        "raw": fm.ArcFace(0.5, "raw"),
        "linear": fm.ArcFace(0.5, "linear"),
        "clamp": fm.ArcFace(0.5, "clamp"),
        "easy": fm.ArcFace(0.5, "easy"),
    },
    "Multiplicative": {
        "psi, m = 1.7": fm.SphereFace(1.7),
        "psi, m = 4": fm.SphereFace(4),
        "m = 4, lambda = 5": fm.Annealed(fm.SphereFace(4), 5.0),
        "R v1, m = 1.7": fm.SphereFaceR(1.7, 1),
    },
    "Other functions of the angle": {
        "X2": fm.X2Softmax(),
        "AirFace": fm.LiArcFace(rivals="cosine"),
    },
    "Support vectors": {"SV 1.2": fm.SVSoftmax(1.2), "SV-X, ArcFace": fm.SVSoftmax(1.2, fm.ArcFace(0.5))},
    "Mis-classified vectors": {"MV adaptive": fm.MVSoftmax(), "MV fixed": fm.MVSoftmax(mode="fixed")},
    "Curricular, t = 0.3; NPC; ArcNeg": {
        "Curricular": fm.CurricularFace(),
        "NPC": fm.NPCFace(),
        "ArcNeg": fm.ArcNegFace(),
    },
    "Bounds": {"EqM": fm.EqM(), "filter 0.4": fm.InterclassFilter(), "Circle 0.25": fm.CircleLoss()},
    "Adaptive": {"AdaFace, poor image": fm.AdaFace(), "MagFace, norm 110": fm.MagFace()},
    "Without softmax": {"SphereFace2 C": fm.SphereFace2(100), "UniFace": fm.UniFace(100)},
    "Generalized angular": {
        "linear": fm.GASoftmax("linear"),
        "sigmoid": fm.GASoftmax("sigmoid"),
        "R v2, m = 1.4": fm.SphereFaceR(1.4, 2),
    },
    "Direct": {"SFace": fm.SFace(), "P2SGrad": fm.P2SGrad()},
}


def curves(margin: fm.Margin) -> tuple[Tensor, Tensor]:
    """T and N over ANGLES."""
    if isinstance(margin, fm.CurricularFace):
        margin.t.fill_(0.3)
    if isinstance(margin, torch.nn.Module):
        margin.eval()
    count = len(ANGLES)
    norm = torch.full((count,), 110.0 if isinstance(margin, fm.MagFace) else 0.0, dtype=torch.float64)
    labels = torch.zeros(count, dtype=torch.long)
    c = torch.cos(torch.deg2rad(ANGLES))
    valid = torch.ones(count, dtype=torch.bool)
    found = fm.RowStats(valid, count + 1, c.dtype, c, norm)
    with torch.no_grad():
        record = margin.prepare(found, labels)
        rule, record = record.rule(), record.at(labels, count + 1, c.dtype)
        tau = record.threshold(torch.full_like(c, math.cos(math.radians(TARGET))))
        return record.target(c), RULES[rule.name].value(c, tau, rule.tensor(c))


def panel(axes: Axes, title: str, margins: dict[str, fm.Margin]) -> None:
    axes.plot(ANGLES, torch.cos(torch.deg2rad(ANGLES)), color="#BBBBBB", linewidth=4, zorder=1)
    for colour, (name, margin) in zip(COLOURS, margins.items(), strict=False):
        target, rival = curves(margin)
        axes.plot(ANGLES, target, color=colour, linewidth=1.8, label=name)
        if not torch.allclose(rival, torch.cos(torch.deg2rad(ANGLES))):
            jumps = rival.diff().abs() > 0.1
            rival = rival.clone()
            rival[1:][jumps] = torch.nan
            axes.plot(ANGLES, rival, color=colour, linewidth=1.5, linestyle=(0, (2, 1.2)))
    axes.set(title=title, xlim=(0, 180), ylim=(-2.2, 1.5), xticks=range(0, 181, 60))
    axes.xaxis.set_major_formatter("{x:g}°")
    corner = "upper right" if title == "Multiplicative" else "lower left"
    axes.legend(loc=corner, fontsize=7.5, handlelength=1.4, borderpad=0.2, labelspacing=0.25)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("losses.png"), metavar="FILE", help="a PNG (default: losses.png)")
    out = p.parse_args().out
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 4, figsize=(13, 8.6), dpi=120, layout="constrained", sharex=True, sharey=True)
        figure.suptitle("The losses: what each makes of an angle", size=15, weight="bold")
        for place, (title, margins) in zip(axes.flat, PANELS.items(), strict=True):
            panel(place, title, margins)
        figure.supxlabel(
            "angle between embedding and class centre     solid: target logit T     dashed: rival logit N, where it is "
            "not the cosine, for a target at 60°     grey: the cosine"
        )
        figure.savefig(out, format="png")
    print(out)


if __name__ == "__main__":
    main()
